"""A block of the student's logits against a list of the teacher's ids, whole or a sample.

Of a list that says what all other ids have together, the others are one id more, in both models: a
coarser pair of distributions, whose divergence is at most that of the full ones. A sample of ids,
whose weights are the teacher's probabilities in expectation, gives forward KL without bias (Sparse
Logit Sampling, 2025, arXiv:2503.16870).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from neo.losses.comparisons import Compared, Comparison, StudentBlock, reported
from neo.losses.distillation import Distillation
from neo.losses.given import Listed, of_tokens
from neo.losses.gradients import Softened, ValueAndGradient, divergence_of, log_partition

# Log-probability that stands for none: its exponential is 0, and differences of two are numbers.
NONE = -1e4


@dataclass(frozen=True)
class ByList(Comparison):
    """A teacher that gives some ids and what the others have together, or a sample of ids."""

    listed: Listed

    def at(self, block: slice) -> "ByList":
        """Those of some of the tokens."""
        return ByList(of_tokens(self.listed, block))

    def against(
        self,
        student: StudentBlock,
        targets: Int64[Tensor, "block 1"],
        spec: Distillation,
        *,
        gradient: bool,
    ) -> Compared:
        """By forward KL in expectation where it is a sample, else by any divergence."""
        compare = _sampled if self.listed.log_rest is None else _coarse
        kd, slope = compare(self.listed, student, spec, gradient=gradient)
        return reported(kd, slope, student, self.listed.facts)


def _sampled(
    listed: Listed, student: StudentBlock, spec: Distillation, *, gradient: bool
) -> ValueAndGradient:
    """Forward KL, whose value and gradient are linear in the teacher's probabilities."""
    assert listed.entropy is not None
    temperature = float(spec.temperature)
    q, log_z = student.softened(temperature)
    weights = listed.log_p.to(q.dtype).exp()  # 0 in unused places
    cross = log_z.unsqueeze(-1) - student.logits.gather(-1, listed.ids) / temperature
    kd = temperature**2 * ((weights * cross).sum(-1) - listed.entropy)
    if not gradient:
        return kd, None
    slope = q * (temperature * weights.sum(-1, keepdim=True))
    return kd, slope.scatter_add_(-1, listed.ids, -temperature * weights)


def _coarse(
    listed: Listed, student: StudentBlock, spec: Distillation, *, gradient: bool
) -> ValueAndGradient:
    """Any divergence between the two once all ids that are not listed are one id."""
    assert listed.log_rest is not None
    temperature = float(spec.temperature)
    q, log_z = student.softened(temperature)
    unused = listed.log_p == -torch.inf
    ids = torch.where(unused, listed.ids[:, :1], listed.ids)
    rest = q.scatter(-1, ids, 0.0).sum(-1)
    # With every id listed there is no other, and no place for one.
    full = (~unused).sum(-1) == q.shape[-1]
    log_rest_q = rest.clamp_min(torch.finfo(q.dtype).tiny).log().masked_fill(full, NONE)
    log_q = student.logits.gather(-1, ids) / temperature - log_z.unsqueeze(-1)
    a = torch.cat([log_q.masked_fill(unused, NONE), log_rest_q.unsqueeze(-1)], -1).to(q.dtype)
    log_rest_p = listed.log_rest.to(q.dtype).masked_fill(full, NONE)
    log_p = listed.log_p.to(q.dtype).masked_fill(unused, NONE)
    b = torch.cat([log_p, log_rest_p.unsqueeze(-1)], -1)
    qa, pb = a.softmax(-1), b.softmax(-1)
    both = Softened(a, b, qa, pb, log_partition(a.amax(-1), qa), log_partition(b.amax(-1), pb))
    kd, coarse = divergence_of(both, spec.divergence, 1.0, gradient=gradient)
    kd = temperature**2 * kd
    if coarse is None:
        return kd, None
    # The ids that are not listed share the last place's gradient by their share of its probability.
    share = coarse[:, -1] / rest.clamp_min(torch.finfo(q.dtype).tiny)
    slope = q * share.masked_fill(full, 0.0).unsqueeze(-1)
    each = torch.where(unused, coarse[:, :1], coarse[:, :-1])
    return kd, slope.scatter_(-1, ids, each).mul_(temperature)
