"""How models are evaluated: what a command may say, and what of it decides the numbers."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST_BATCH = 64  # what `auto` begins with, as the harness does


@dataclass(kw_only=True)
class Generation:
    """How answers are drawn; what is not given is the task's, and then the model's own.

    Args:
        temperature: 0 is greedy; above 0 answers are sampled.
        do_sample: Whether they are sampled; by itself it follows from the temperature.
        top_p: Only the likeliest tokens that together have this probability.
        top_k: Only so many of the likeliest tokens; 0 for all.
        min_p: Only tokens at least this share as likely as the likeliest.
        repetition_penalty: Above 1 makes what was said before less likely.
        max_gen_toks: Tokens of an answer at most.
    """

    temperature: float | None = None
    do_sample: bool | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_gen_toks: int | None = None

    def problems(self) -> list[str]:
        """What is wrong with these values, each with what would be legal."""
        found = []
        for name, legal, fits in (
            ("temperature", "at least 0", lambda x: 0 <= x < float("inf")),
            ("top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
            ("top_k", "at least 0", lambda x: x >= 0),
            ("min_p", "from 0 to 1", lambda x: 0 <= x <= 1),
            ("repetition_penalty", "above 0", lambda x: 0 < x < float("inf")),
            ("max_gen_toks", "at least 1", lambda x: x >= 1),
        ):
            value = getattr(self, name)
            if value is not None and not fits(value):
                found.append(f"generate.{name}={value}: must be {legal}")
        if self.do_sample and not self.temperature:
            found.append(
                "generate.do_sample=true: needs generate.temperature above 0; without one the "
                "harness answers greedily"
            )
        if self.do_sample is False and self.temperature:
            found.append(
                f"generate.temperature={self.temperature}: do_sample=false is greedy; leave one out"
            )
        if not self.sampled:
            for name in ("top_p", "top_k", "min_p"):
                if getattr(self, name) is not None:
                    found.append(
                        f"generate.{name}={getattr(self, name)}: is of sampling, and greedy "
                        "answers do not heed it; give generate.temperature above 0"
                    )
        return found

    @property
    def sampled(self) -> bool:
        """Whether these settings have answers drawn at random."""
        return bool(self.temperature) and self.do_sample is not False

    def given(self) -> dict[str, Any]:
        """What was said, as the harness takes it; empty where nothing was."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if "temperature" in given:
            # 0 and false, both: a task's own sampling would stand beside one of them
            given["do_sample"] = self.sampled
        return given


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How every model of a command is evaluated.

    Args:
        num_fewshot: Examples before each question; None leaves each task its own.
        limit: Rows of each task, or below 1 a share of them; None for all.
        batch_size: None for one that is found.
        device: Such as `cpu` or `cuda:1`.
        dtype: Of the weights; `auto` is the one they are stored in.
        chat: Whether the tokenizer's chat template is put around each prompt.
        generation: How answers are drawn.
        seed: Of examples and of drawn answers.
    """

    num_fewshot: int | None = None
    limit: int | float | None = None
    batch_size: int | None = None
    device: str = "cpu"
    dtype: str = "auto"
    chat: bool = False
    generation: Generation = field(default_factory=Generation)
    seed: int = 1234

    def problems(self) -> list[str]:
        """What is wrong with these values, each with what would be legal."""
        found = []
        if self.num_fewshot is not None and self.num_fewshot < 0:
            found.append(f"num_fewshot={self.num_fewshot}: must be at least 0, or null")
        limit = self.limit
        if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
            found.append(f"limit={limit}: must be a whole number of rows, a share below 1, or null")
        if self.batch_size is not None and self.batch_size < 1:
            found.append(f"batch_size={self.batch_size}: must be auto or at least 1")
        if self.dtype not in DTYPES:
            found.append(f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.seed < 0:
            found.append(f"seed={self.seed}: must be at least 0")
        return [*found, *_device_problems(self.device), *self.generation.problems()]

    def deciding(self) -> dict[str, Any]:
        """What numbers depend on, in plain JSON types; not where, or how many at once."""
        known = {
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "dtype": self.dtype,
            "chat": self.chat,
            "generate": self.generation.given(),
            "seed": self.seed,
        }
        return {name: value for name, value in known.items() if value is not None}


def chosen_device(device: str) -> str:
    """The device that `auto` stands for: a GPU where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def batch_size_of(given: Any) -> int | None:
    """None for `auto`, else the number.

    Raises:
        ValueError: It is neither.
    """
    if given is None or given == "auto":
        return None
    if isinstance(given, bool) or not isinstance(given, int):
        raise ValueError(f"batch_size={given!r}: must be auto or a whole number")
    return given


def _device_problems(device: str) -> list[str]:
    try:
        meant = torch.device(device)
    except RuntimeError:
        return [f"device={device!r}: must be auto, cpu, cuda, or one GPU such as cuda:1"]
    if meant.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            return [f"device={device!r}: torch sees no GPU here; use device=cpu"]
        if (meant.index or 0) >= count:
            return [f"device={device!r}: there are {count} GPUs, the last is cuda:{count - 1}"]
    elif meant.type not in ("cpu", "mps"):
        return [f"device={device!r}: must be auto, cpu, cuda, or one GPU such as cuda:1"]
    return []
