"""Models as the harness loads them, on one device, at a batch size that may be made smaller."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length

from neo.evaluation.candidates import Candidate
from neo.evaluation.settings import Settings
from neo.models.trained import with_adapter

# What of the free memory a first guess may take: the rest is for what it does not count.
SHARE = 0.5


class TooLarge(RuntimeError):
    """A batch that is likely not to fit; says how many rows might."""

    def __init__(self, fits: int) -> None:
        super().__init__(f"{fits} rows at once might fit")
        self.fits = fits


class FittingLM(HFLM):
    """The harness's own model, which refuses batches that would not fit before it runs them.

    A GPU that runs out of memory says so, and the batch is made smaller; a CPU's process is killed
    instead, so there the size has to be known before. Otherwise it is what `--model hf` is.
    """

    guard = False

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if self.guard and requests:
            self._check(max(len(asked) + len(said) for _, asked, said in requests), whole=True)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Answers, one for each request."""
        if self.guard and requests:
            longest = sorted((r.args for r in requests), key=lambda a: len(a[0]))[-LONGEST:]
            self._check(
                max(
                    len(self.tok_encode(text))
                    + normalize_gen_kwargs(asked, self.max_gen_toks)["max_gen_toks"]
                    for text, asked in longest
                ),
                whole=False,
            )
        return super().generate_until(requests, *args, **kwargs)

    def _check(self, length: int, *, whole: bool) -> None:
        fits = rows_that_fit(
            self.model, min(length, self.max_length), free_bytes(self.device), whole
        )
        if fits < int(self.batch_size):
            raise TooLarge(fits)


LONGEST = 32  # prompts by their letters, among which the longest by its tokens is


@dataclass
class RandomState:
    """Where random numbers stand: as the harness's command has them when it begins to ask."""

    python: Any
    numpy: Any
    torch: Any
    cuda: Any

    @classmethod
    def now(cls) -> "RandomState":
        """The state of this process."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def set(self) -> None:
        """Makes it the state of this process again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready, and the random state behind its loading."""

    lm: FittingLM
    state: RandomState


def model_arguments(
    candidate: Candidate, settings: Settings, tokenizer: Path | None
) -> dict[str, Any]:
    """What `--model_args` of the harness's command says for the candidate.

    Args:
        candidate: Not quantised.
        settings: Its dtype.
        tokenizer: A folder with another tokenizer than the model's own.
    """
    spec = candidate.spec
    found: dict[str, Any] = {"pretrained": candidate.weights}
    if candidate.adapter is not None:
        found["peft"] = str(candidate.adapter.resolve())
    if tokenizer is not None:
        found["tokenizer"] = str(tokenizer.resolve())
    found["dtype"] = settings.dtype
    if spec.revision is not None and not candidate.is_whole:
        found["revision"] = spec.revision
    if spec.attn_implementation is not None:
        found["attn_implementation"] = spec.attn_implementation
    if spec.trust_remote_code:
        found["trust_remote_code"] = True
    return found


def load(candidate: Candidate, settings: Settings, tokenizer: Path | None) -> Loaded:
    """The candidate on its device, seeded as the harness's command seeds before it loads.

    A quantised model is loaded as its run did; all others by the harness itself.
    """
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    size = settings.batch_size or 1
    if not candidate.loads_as_run:
        lm = FittingLM(
            device=settings.device,
            batch_size=size,
            **model_arguments(candidate, settings, tokenizer),
        )
    else:
        lm = FittingLM(
            pretrained=_quantised(candidate, settings),
            tokenizer=candidate.spec.tokenizer() if tokenizer is None else str(tokenizer),
            batch_size=size,
        )
    return Loaded(lm=lm, state=RandomState.now())


def length_of(candidate: Candidate) -> int:
    """How many tokens the model takes at most, as the harness finds it; no weight is read."""
    return int(resolve_max_length(candidate.spec.config(), candidate.spec.tokenizer()))


def rows_that_fit(model: Any, length: int, free: float, whole: bool) -> int:
    """How many rows of so many tokens a part of the free memory is enough for; at least 1.

    Counted are logits and their logarithm for every token (`whole`) or for one, keys and values,
    and the inner activations of one layer.

    Args:
        model: Its config and dtype are read.
        length: In tokens.
        free: In bytes.
        whole: Whether logits of all positions are held.
    """
    config = model.config.get_text_config()
    size = torch.finfo(model.dtype).bits // 8
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    logits = 2 * config.vocab_size * (length if whole else 1)
    kept = 2 * config.num_hidden_layers * heads * head * length
    row = size * (logits + kept + (3 * inner + 6 * config.hidden_size) * length)
    return max(1, int(SHARE * free // row))


def free_bytes(device: torch.device) -> float:
    """What can still be taken of the device's memory; of a CPU's, what its container allows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + cached)
    free = psutil.virtual_memory().available
    try:  # version 2 of Linux' control groups; a machine without a limit says "max"
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return float(max(free, 0))


def out_of_memory(error: BaseException) -> bool:
    """Whether fewer rows at once could have gone well."""
    return isinstance(error, MemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def _quantised(candidate: Candidate, settings: Settings) -> Any:
    plain = replace(candidate.spec, activation_checkpointing=False)
    if settings.dtype != "auto":
        plain = replace(plain, dtype=settings.dtype)
    device = torch.device(settings.device)
    model: Any = plain.load(device, trained=False).to(device)
    if candidate.adapter is not None:
        model = with_adapter(model, candidate.adapter)
    return model.eval()
