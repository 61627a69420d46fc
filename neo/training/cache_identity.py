"""What a run's cache is: what is kept of its teacher, and what names it."""

from collections.abc import Mapping
from typing import Any

import torch

from neo.data.datamodule import DataModule
from neo.losses.head import Head
from neo.models.causal_lm import CausalLM
from neo.teachers.identity import identity_of
from neo.teachers.online import OnlineTeacher
from neo.teachers.stored import Stored
from neo.training.devices import on_gpu
from neo.training.step_cost import AUTOCAST, planned_dtype


def teacher_dtype(teacher: OnlineTeacher, trainer: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the teacher's weights in a run, before they are read."""
    if teacher.quantization == "int4" and teacher.dtype == "auto":
        return torch.bfloat16
    own = torch.device(teacher.device).type if teacher.device else None
    return planned_dtype(teacher, own or ("cuda" if on_gpu(trainer) else "cpu"))


def autocast_dtype(trainer: Mapping[str, Any]) -> torch.dtype | None:
    """That of products under the trainer's precision; None for that of the weights."""
    return AUTOCAST.get(str(trainer.get("precision", "32-true")))


def hidden_dtype(teacher: OnlineTeacher, trainer: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which a run's loss multiplies the teacher's hidden states."""
    return autocast_dtype(trainer) or teacher_dtype(teacher, trainer)


def head_dtype(student: CausalLM, trainer: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which a run's loss multiplies the student's frozen head.

    A teacher is projected on the head as it is multiplied: that of another dtype is another one.
    """
    own = planned_dtype(student, "cuda" if on_gpu(trainer) else "cpu")
    return autocast_dtype(trainer) or own


def spelt_dtype(dtype: torch.dtype) -> str:
    """Its name.

    Example:
        >>> spelt_dtype(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def cache_identity(
    config: Mapping[str, Any],
    teacher: OnlineTeacher | None,
    data: DataModule,
    stored: Stored,
    vocab: int,
    student_head: Head | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What names a run's cache.

    Args:
        config: Of the run.
        teacher: None leaves it out: a cache that is given says which it was.
        data: Its rows, opened.
        stored: What is kept, resolved.
        vocab: Ids that both models share.
        student_head: Of kind `projected` alone.
    """
    autocast = autocast_dtype(config["trainer"])
    dtype = "" if teacher is None else spelt_dtype(teacher_dtype(teacher, config["trainer"]))
    return identity_of(
        teacher=teacher,
        teacher_dtype=dtype,
        autocast=None if autocast is None else spelt_dtype(autocast),
        tokenizer=data.encoder.tokenizer,
        chat_template=data.encoder.template,
        data=data.data,
        schema=data.schema,
        stored=stored,
        vocab=vocab,
        student_head=student_head,
    )
