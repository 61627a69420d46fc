"""How a run ends: what its record says of an error, and the trained weights on disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from neo.models.student import save_student
from neo.training.out_of_memory import explained, is_out_of_memory
from neo.training.pruning import Pruned
from neo.training.skipped_steps import DivergedError


class OutputError(RuntimeError):
    """What a run has to write in the end could not be written."""


def ended_by(error: BaseException, config: Mapping[str, Any]) -> tuple[str, BaseException]:
    """The status of a run that was stopped by this, and what to raise: the same, or explained."""
    if is_out_of_memory(error):
        return "oom", explained(error, config)
    if isinstance(error, DivergedError):
        return "diverged", error
    if isinstance(error, Pruned):
        return "pruned", error
    stopped = isinstance(error, KeyboardInterrupt | SystemExit)
    return "interrupted" if stopped else "failed", error


def write_student(student: nn.Module, tokenizer: Any, folder: Path, saved: bool) -> None:
    """Writes the trained weights.

    Args:
        student: What was trained.
        tokenizer: Goes with it.
        folder: Of the run.
        saved: Whether the newest checkpoint holds the same weights.

    Raises:
        OutputError: The weights could not be written.
    """
    try:
        save_student(student, tokenizer, folder)
    except (OSError, SafetensorError) as error:
        holds = "holds them" if saved else "is older"
        raise OutputError(
            f"{folder}: the trained weights could not be written: {error}\nThe newest checkpoint "
            f"{holds}: once there is room, start the same run again, and it goes on from there"
        ) from error
