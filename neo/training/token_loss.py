"""The loss of a batch: what two models give for its supervised tokens, summed."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from neo.data.packing import Batch
from neo.data.prompt import IGNORE
from neo.losses.distillation import Distillation, TokenSums
from neo.losses.fused import fused_sums
from neo.losses.given import Given, HiddenStates
from neo.losses.head import Head
from neo.models.head import OutputHead, head_of
from neo.models.hidden import hidden_states


def batch_sums(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Given | None,
    batch: Batch,
    spec: Distillation,
    vocab: int,
    *,
    kd_positions: str = "aligned",
) -> TokenSums:
    """Sums over the supervised tokens of a batch; hidden states of no other token reach a head.

    Args:
        student: Its trained weights get gradient.
        teacher: A model, or what it has given for the supervised tokens of the batch; None where
            none is to be compared with.
        batch: Tokens and aligned targets.
        spec: Divergence, ratio and temperature; its own `kd_positions` is for training alone.
        vocab: Ids that both models share.
        kd_positions: Where they are compared, as in `Distillation`.
    """
    supervised = batch.targets != IGNORE
    targets = batch.targets[supervised]
    released = kd_positions == "release" and teacher is not None
    compared = one_later(supervised) if released else supervised
    used = supervised | compared
    of_student = outputs_of(student, batch, used)
    is_model = isinstance(teacher, PreTrainedModel)
    given = given_by(teacher, batch, used) if is_model else teacher
    if released:
        if not (is_model and isinstance(given, HiddenStates)):
            raise ValueError("loss.kd_positions=release: needs a teacher that runs beside it")
        which = (supervised[used], compared[used])
        return _release_sums(of_student, given, *which, targets, spec, vocab)
    return _sums(of_student, given, targets, spec, vocab)


def one_later(which: Bool[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
    """The positions after those chosen; the last of a row has none after it.

    A row's last token is never supervised, nor is an example's, so that none is lost and none lies
    in the next example.
    """
    return nn.functional.pad(which[:, :-1], (1, 0))


@dataclass(frozen=True)
class Outputs:
    """What a model gives for some tokens: hidden states, and what its head makes logits of."""

    hidden: Float[Tensor, "tokens d"]
    branch: Float[Tensor, "tokens r"] | None
    head: Head

    def at(self, which: Bool[Tensor, " tokens"]) -> "Outputs":
        """Those of the tokens that are chosen."""
        branch = None if self.branch is None else self.branch[which]
        return replace(self, hidden=self.hidden[which], branch=branch)

    def logits(self, vocab: int) -> Float[Tensor, "tokens vocab"]:
        """Those that the loss is taken of, over the ids in [0, `vocab`); without gradient."""
        dtype = self.hidden.dtype
        branch = None if self.branch is None else self.branch.detach().to(dtype)
        return self.head.to(dtype).logits(self.hidden.detach(), stop=vocab, branch_input=branch)


def given_by(
    teacher: PreTrainedModel, batch: Batch, which: Bool[Tensor, "batch length"]
) -> HiddenStates:
    """What a teacher that is there gives for the tokens chosen."""
    with torch.no_grad():
        outputs = outputs_of(teacher, batch, which)
    return HiddenStates(hidden=outputs.hidden, head=outputs.head)


def outputs_of(
    model: PreTrainedModel, batch: Batch, which: Bool[Tensor, "batch length"]
) -> Outputs:
    """What the model gives for the tokens chosen, on the device of `which`."""
    hidden = hidden_states(model, batch.input_ids, batch.position_ids)
    # Of a teacher on a device of its own, nothing but the tokens wanted travels.
    hidden = hidden[which.to(hidden.device)].to(which.device)
    head = head_of(model)
    branch = None if head.lora is None else head.lora.states(hidden)
    return Outputs(hidden, branch, factors_of(head))


def factors_of(head: OutputHead) -> Head:
    """A model's head as the loss takes it."""
    return Head(
        weight=head.weight,
        bias=head.bias,
        branch=None if head.lora is None else head.lora.up,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )


def _sums(
    student: Outputs,
    teacher: Given | None,
    targets: Int64[Tensor, " tokens"],
    spec: Distillation,
    vocab: int,
    *,
    measure: bool = False,
) -> TokenSums:
    return fused_sums(
        student.hidden,
        student.head,
        teacher,
        targets,
        spec,
        vocab,
        student_branch=student.branch,
        measure=measure,
    )


def _release_sums(
    student: Outputs,
    teacher: HiddenStates,
    supervised: Bool[Tensor, " used"],
    compared: Bool[Tensor, " used"],
    targets: Int64[Tensor, " tokens"],
    spec: Distillation,
    vocab: int,
) -> TokenSums:
    """Sums as the code released with the paper takes them: the divergence one position late.

    That code picks the logits to compare by labels that are not shifted, those of the
    cross-entropy by shifted ones. It is there for comparison only: the logits of both models are
    computed twice. All but `kd` is measured where the cross-entropy is taken.
    """
    at, later = (
        (student.at(which), replace(teacher, hidden=teacher.hidden[which]), targets)
        for which in (supervised, compared)
    )
    ce = _sums(*at, replace(spec, kd_ratio=0), vocab, measure=True)
    # The targets are not those of these positions; with kd_ratio 1 nothing depends on them.
    kd = _sums(*later, replace(spec, kd_ratio=1), vocab)
    weighted = [(1 - spec.kd_ratio, ce.loss), (spec.kd_ratio, kd.loss)]
    loss = torch.stack([weight * value for weight, value in weighted if weight > 0]).sum()
    return replace(ce, loss=loss, kd=kd.kd)
