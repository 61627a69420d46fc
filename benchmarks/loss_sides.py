"""The ways to compute the loss that `loss.py` compares, from hidden states to their gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from neo.losses import gradients
from neo.losses.distillation import Distillation
from neo.losses.fused import fused_sums
from neo.losses.given import HiddenStates
from neo.losses.head import Head
from neo.losses.products import times, times_transposed

KD_RATIO = 0.5
IGNORE = -100
Side = Callable[["Inputs"], tuple[float, Tensor]]


@dataclass(frozen=True)
class Inputs:
    """Hidden states and frozen heads in float32; every second position is supervised."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor

    @property
    def keep(self) -> Tensor:
        """Which positions are supervised."""
        return self.targets != IGNORE


def make_inputs(tokens: int, vocab: int, d_student: int, d_teacher: int) -> Inputs:
    """Random inputs whose logits are of the size that models give, a few units."""
    torch.manual_seed(0)
    targets = torch.randint(vocab, (tokens,))
    targets[::2] = IGNORE
    return Inputs(
        hidden=torch.randn(tokens, d_student).requires_grad_(),
        weight=torch.randn(vocab, d_student).mul_(2 * d_student**-0.5),
        teacher_hidden=torch.randn(tokens, d_teacher),
        teacher_weight=torch.randn(vocab, d_teacher).mul_(2 * d_teacher**-0.5),
        targets=targets,
    )


def _gradient(loss: Tensor, inputs: Inputs) -> tuple[float, Tensor]:
    return loss.item(), torch.autograd.grad(loss, inputs.hidden)[0]


def neo(inputs: Inputs, spec: Distillation | None = None) -> tuple[float, Tensor]:
    """This project's, with the gathering of supervised rows."""
    keep = inputs.keep
    sums = fused_sums(
        inputs.hidden[keep],
        Head(weight=inputs.weight),
        HiddenStates(hidden=inputs.teacher_hidden[keep], head=Head(weight=inputs.teacher_weight)),
        inputs.targets[keep],
        spec or Distillation(kd_ratio=KD_RATIO),
        len(inputs.weight),
    )
    return _gradient(sums.loss / sums.tokens, inputs)


def full_logits(inputs: Inputs) -> tuple[float, Tensor]:
    """The paper's way: logits of all positions, autograd; KL over the supervised rows."""
    logits = inputs.hidden @ inputs.weight.T
    with torch.no_grad():
        teacher_logits = inputs.teacher_hidden @ inputs.teacher_weight.T
    ce = F.cross_entropy(logits, inputs.targets, ignore_index=IGNORE)
    keep = inputs.keep
    student, teacher = logits[keep], teacher_logits[keep]
    kd = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    return _gradient((1 - KD_RATIO) * ce + KD_RATIO * kd, inputs)


def liger(inputs: Inputs) -> tuple[float, Tensor]:
    """`LigerFusedLinearJSDLoss` at beta 0, which is forward KL, with its CE; not compiled."""
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - KD_RATIO, weight_soft_loss=KD_RATIO, beta=0.0, compiled=False
    )
    return _gradient(
        loss(
            inputs.hidden,
            inputs.weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.targets,
        ),
        inputs,
    )


def trl(inputs: Inputs) -> tuple[float, Tensor]:
    """TRL's chunked forward KL over the supervised rows; it has no CE."""
    keep = inputs.keep
    divergence, _ = ChunkedDivergenceFunction.apply(
        inputs.hidden[keep],
        inputs.weight,
        None,
        inputs.teacher_hidden[keep],
        inputs.teacher_weight,
        None,
        0.0,  # beta: forward KL
    )
    return _gradient(divergence.mean(), inputs)


def floor_mm(inputs: Inputs) -> tuple[float, Tensor]:
    """The three products over the supervised rows by torch.mm, into memory that is there."""
    h, h_t = _supervised(inputs)
    logits = torch.mm(h, inputs.weight.T, out=_scratch(len(h), len(inputs.weight), 0))
    torch.mm(h_t, inputs.teacher_weight.T, out=_scratch(len(h), len(inputs.weight), 1))
    return 0.0, torch.mm(logits, inputs.weight)


def floor(inputs: Inputs) -> tuple[float, Tensor]:
    """The three products over the supervised rows as neo makes them."""
    h, h_t = _supervised(inputs)
    logits = times_transposed(h, inputs.weight)
    times_transposed(h_t, inputs.teacher_weight)
    return 0.0, times(logits, inputs.weight)


def _supervised(inputs: Inputs) -> tuple[Tensor, Tensor]:
    keep = inputs.keep
    return inputs.hidden.detach()[keep], inputs.teacher_hidden[keep]


_SCRATCH: dict[tuple[int, int, int], Tensor] = {}


def _scratch(rows: int, columns: int, number: int) -> Tensor:
    key = (rows, columns, number)
    if key not in _SCRATCH:
        _SCRATCH[key] = torch.empty(rows, columns)
    return _SCRATCH[key]


def by_autograd(inputs: Inputs, spec: Distillation) -> tuple[float, Tensor]:
    """This project's with the divergence's gradient left to autograd, for comparison."""
    closed = dict(gradients.CLOSED_FORMS)
    gradients.CLOSED_FORMS.clear()
    try:
        return neo(inputs, spec)
    finally:
        gradients.CLOSED_FORMS.update(closed)


SIDES: dict[str, Side] = {
    "floor": floor,
    "floor_mm": floor_mm,
    "neo": neo,
    "full_logits": full_logits,
    "liger": liger,
    "trl": trl,
}


def divergence_sides(divergences: dict[str, Distillation]) -> dict[str, Side]:
    """Each divergence in closed form and by autograd, beside the floor."""
    sides: dict[str, Side] = {"floor": floor}
    for name, spec in divergences.items():
        sides[f"{name}/closed"] = partial(neo, spec=spec)
        sides[f"{name}/autograd"] = partial(by_autograd, spec=spec)
    return sides
