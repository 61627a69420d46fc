import json
import socket

import pytest
from hydra.core.hydra_config import HydraConfig
from lab import tiny_model, tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from neo.models.architectures import ARCHITECTURES
from neo.models.causal_lm import CausalLM

CORPUS = [
    "user assistant system tool question answer First Second the quick brown fox jumps",
    "def f(x):\n    return x + 1\n\nWhat is 12 + 30? It is 42. Straße, déjà vu, 東京, Привет!",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(template: str | None, *extra: str, **special: str):
    """A byte-level BPE over all bytes with a few merges; `extra` are special tokens besides."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", **special}
    tokens = list(dict.fromkeys(["<|im_start|>", *special.values(), *extra]))
    # like Llama 3's: the space before a word is not part of its offsets
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in tokens],
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def metaspace_tokenizer(template: str | None):
    """A Llama-2-like tokenizer: pieces begin with a marked space, rare ones fall apart to bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    marks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*marks, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        show_progress=False,
        special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))],
        limit_alphabet=60,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special)]  # bytes are ordinary pieces
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


@pytest.fixture
def no_network(monkeypatch):
    """The hub, and whatever else, cannot be asked."""

    def connect(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket, "create_connection", connect)


@pytest.fixture(autouse=True)
def _no_job_of_hydra_is_left():
    """A command that is run in this process leaves Hydra's config behind, as if a job still ran."""
    yield
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return byte_level_tokenizer(CHATML)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "student", hidden=32, seed=1)


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "teacher", hidden=48, seed=2)


@pytest.fixture(scope="session")
def llama_1b(tmp_path_factory):
    """Llama-3.2-1B's configuration, without weights."""
    folder = tmp_path_factory.mktemp("llama")
    ARCHITECTURES["meta-llama/Llama-3.2-1B"].config().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return CausalLM(path=str(folder), random_init=True)
