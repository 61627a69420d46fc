"""Builders that tests share: small models as real folders, and the composed config of a run."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
)  # fmt: skip

from neo import train
from neo.config import resolve
from neo.data.mini_tokenizer import build_tokenizer
from neo.models.calibration import Calibration, CalibrationBatch

# What each family adds to hidden states before it calls them logits differs: that is the point.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 64}),
    "granite": (GraniteConfig, {"logits_scaling": 8.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.0625}),
}

ROWS = [
    {"prompt": "What is 2 + 3?", "completion": "5"},
    {"prompt": "Größe? 東京 🙂", "completion": "Straße, déjà vu"},
    {"prompt": "Sort: c a b", "completion": "a b c"},
    {"prompt": "Say hello", "completion": "hello"},
    {"prompt": "What is 12 - 7?", "completion": "5"},
    {"prompt": "Reverse abc", "completion": "cba"},
    {"prompt": "Count the letters of banana", "completion": "six of them"},
    {"prompt": "Which is larger, 4 or 9?", "completion": "9"},
]


@cache
def tokenizer() -> Any:
    return build_tokenizer()


def calibration(num_batches: int = 2, length: int = 24, seed: int = 0) -> Calibration:
    """Sequences of random tokens of which the second half is supervised, with the cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        ids = torch.randint(3, 60, (4, length), generator=generator)
        places = torch.arange(length).repeat(4, 1)
        batches.append(
            CalibrationBatch(ids, places, (places >= length // 2) & (places < length - 1))
        )

    def backward(model: Any) -> None:
        for batch in batches:
            targets = batch.input_ids.roll(-1, 1)[batch.supervised]
            logits = model(input_ids=batch.input_ids).logits[batch.supervised]
            torch.nn.functional.cross_entropy(logits, targets).backward()

    return Calibration(batches, backward)


def tiny_model(
    folder: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    family: str = "llama",
    rows: int | None = None,
    tie: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A model folder as from_pretrained reads it, with the mini tokenizer and `rows` head rows."""
    config_class, extra = FAMILIES[family]
    built = config_class(
        **{
            "vocab_size": rows or len(tokenizer()),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": tie,
            "pad_token_id": tokenizer().pad_token_id,
            "bos_token_id": tokenizer().bos_token_id,
            "eos_token_id": tokenizer().eos_token_id,
            **extra,
            **config,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(built).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A JSONL file of the rows."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def compose(*overrides: str) -> dict[str, Any]:
    """The resolved config of a command line, as `neo.train` gets it."""
    return resolve(compose_raw(*overrides))


def compose_raw(*overrides: str) -> Any:
    """The config of a command line before interpolations are resolved."""
    return train.compose(*overrides)
