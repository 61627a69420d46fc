"""What is kept of a teacher for a run: of its loss and of both heads, before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neo.config import ConfigError
from neo.losses.distillation import Distillation
from neo.models.causal_lm import CausalLM
from neo.models.head import OutputHead, head_of
from neo.models.student import build_meta_student, inner
from neo.models.variants import Variant
from neo.teachers.fields import Shapes, fields_of
from neo.teachers.online import OnlineTeacher
from neo.teachers.stored import Stored
from neo.training.cache_identity import hidden_dtype, spelt_dtype


@dataclass(frozen=True)
class Heads:
    """What is known of both heads before a weight is read.

    Args:
        changes: The student's is trained, or has a branch.
        softcap: Bound on the student's logits.
        d_student: Width of the student's.
        student_bias: It has a bias.
        d_teacher: Width of the teacher's.
        teacher_rows: Rows of the teacher's.
    """

    changes: bool
    softcap: float | None
    d_student: int
    student_bias: bool
    d_teacher: int
    teacher_rows: int

    def shapes(self, kind: str, vocab: int) -> Shapes:
        """Of a cache of that kind."""
        projected = kind == "projected"
        return Shapes(
            vocab=vocab,
            d_student=self.d_student if projected else None,
            d_teacher=self.d_teacher,
            teacher_rows=self.teacher_rows,
            student_bias=projected and self.student_bias,
        )


def heads_of(student: CausalLM, lora: Variant, teacher: OnlineTeacher) -> Heads:
    """Those of a student with its branch, and of its teacher."""
    head, of_teacher = meta_head(student, lora), head_of(teacher.meta())
    return Heads(
        changes=head_changes(head),
        softcap=head.softcap,
        d_student=head.weight.shape[1],
        student_bias=head.bias is not None,
        d_teacher=of_teacher.weight.shape[1],
        teacher_rows=of_teacher.weight.shape[0],
    )


def meta_head(student: CausalLM, lora: Variant) -> OutputHead:
    """That of a student with its branch, on the meta device."""
    return head_of(inner(build_meta_student(student, lora)))


def head_changes(head: OutputHead) -> bool:
    """Whether it is trained, or has a branch."""
    trained = any(x is not None and x.requires_grad for x in (head.weight, head.bias))
    return trained or head.lora is not None


@dataclass(frozen=True)
class Kept:
    """What is kept, of which heads.

    Args:
        stored: Resolved.
        shapes: Of the two heads.
        head_changes: The student's head is trained, or has a branch.
    """

    stored: Stored
    shapes: Shapes
    head_changes: bool


def kept_of(config: Mapping[str, Any], specs: Mapping[str, Any], vocab: int) -> Kept:
    """What the config asks to be kept of its teacher, with the defaults of its loss.

    Args:
        config: Of a run.
        specs: What it says; there is a teacher that runs.
        vocab: Ids that both models share.

    Raises:
        ConfigError: The run's loss cannot be computed from it, or these heads cannot give it.
    """
    teacher, loss = specs["teacher"], specs["loss"]
    heads = heads_of(specs["student"], specs["lora"], teacher)
    stored = teacher.stored(loss, head_changes=heads.changes, softcap=heads.softcap)
    stored = stored.resolved(spelt_dtype(hidden_dtype(teacher, config["trainer"])))
    check_loss(
        stored, loss, f"teacher.kind={stored.kind}",
        head_changes=heads.changes, softcap=heads.softcap,
    )  # fmt: skip
    shapes = heads.shapes(stored.kind, vocab)
    try:
        fields_of(stored, shapes)
    except ValueError as error:
        raise ConfigError([f"teacher.{error}"]) from error
    return Kept(stored, shapes, heads.changes)


def check_loss(
    stored: Stored, spec: Distillation, where: str, *, head_changes: bool, softcap: float | None
) -> None:
    """Raise where a run's loss cannot be computed from what is kept, with all reasons."""
    if reasons := stored.given_refusals(spec, head_changes=head_changes, softcap=softcap):
        raise ConfigError([f"{where}: {reason}" for reason in reasons])
