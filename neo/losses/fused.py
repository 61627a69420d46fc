"""From hidden states to sums, chunk by chunk: the logits of all tokens never exist at once.

The numbers are those of `neo.losses.divergences`. The gradient is made in the forward pass, while a
chunk's logits are there, so that a frozen student head costs three matrix products a token: student
logits, teacher logits, and gradient times head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.chunk import ChunkSums, differentiate_chunk
from neo.losses.distillation import Distillation, TokenSums


@dataclass(frozen=True, kw_only=True)
class Head:
    """How a model makes logits of hidden states: `softcap * tanh(scale * (h W' + b) / softcap)`.

    Args:
        weight: One row per id; rows past the tokenizer's ids are padding.
        bias: Added to the products, where the model has one.
        logit_scale: Factor on the logits (Cohere's `logit_scale`, one over Granite's
            `logits_scaling`).
        softcap: Bound on the size of a logit (Gemma 2's `final_logit_softcapping`).
    """

    weight: Float[Tensor, "rows d"]
    bias: Float[Tensor, " rows"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap}: must be above 0, or None")

    def logits(
        self,
        hidden: Float[Tensor, "chunk d"],
        vocab: int | None = None,
        *,
        out: Float[Tensor, "chunk vocab"] | None = None,
    ) -> Float[Tensor, "chunk vocab"]:
        """Logits over the first `vocab` ids (all rows if None), in float32 or float64.

        Args:
            hidden: Hidden states after the model's last norm, in the dtype of the weight.
            vocab: How many ids, from 0.
            out: Memory to write to instead of new memory.
        """
        return self.between(hidden, 0, len(self.weight) if vocab is None else vocab, out=out)

    def between(
        self,
        hidden: Float[Tensor, "chunk d"],
        start: int,
        stop: int,
        *,
        out: Float[Tensor, "chunk vocab"] | None = None,
    ) -> Float[Tensor, "chunk vocab"]:
        """Logits over the ids in [start, stop), in float32 or float64."""
        weight = self.weight[start:stop]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if out is None:
            logits = (hidden @ weight.T).to(wide)
        elif hidden.dtype == out.dtype:
            logits = torch.mm(hidden, weight.T, out=out)
        else:
            logits = out.copy_(hidden @ weight.T)
        if self.bias is not None:
            logits.add_(self.bias[start:stop])
        if self.logit_scale != 1:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head without gradient, in a dtype; a copy only where that is another."""
        return Head(
            weight=self.weight.detach().to(dtype),
            bias=None if self.bias is None else self.bias.detach().to(dtype),
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )


def fused_sums(
    student_hidden: Float[Tensor, "tokens d_student"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "tokens d_teacher"] | None,
    teacher_head: Head | None,
    targets: Int64[Tensor, " tokens"],
    spec: Distillation,
    vocab: int,
    *,
    measure: bool = False,
) -> TokenSums:
    """Sums of cross-entropy and divergence over supervised tokens, in nats.

    `loss` carries gradient to `student_hidden` and, where they require it, to the student head's
    weight and bias. Both models are compared over the ids in [0, `vocab`): heads padded past them
    are cut and the distributions renormalised, and the teacher's probability on what was cut is
    summed in `teacher_mass_out`.

    Args:
        student_hidden: Hidden states of supervised tokens only.
        student_head: Weight and bias may require gradient.
        teacher_hidden: The teacher's, of the same tokens; None without a teacher.
        teacher_head: Never gets gradient.
        targets: The id each token must predict, in [0, `vocab`).
        spec: Divergence, ratio, temperature and chunk size.
        vocab: How many ids the shared tokenizer has.
        measure: Compare with the teacher although `kd_ratio` is 0 and gradients are on; without
            gradients that is done anyway.
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, spec, vocab)
    training = torch.is_grad_enabled()
    if teacher_hidden is None or (spec.kd_ratio == 0 and training and not measure):
        teacher = None
    else:
        assert teacher_head is not None  # both or neither: checked above
        teacher = (teacher_hidden.detach(), teacher_head)
    loss, ce, kd, agree, mass_out = _FusedSums.apply(
        student_hidden,
        student_head.weight,
        student_head.bias,
        student_head,
        teacher,
        targets,
        spec,
        vocab,
        training,
    )
    return TokenSums(
        loss=loss,
        ce=ce,
        kd=kd if teacher else None,
        tokens=torch.tensor(len(targets), device=loss.device),
        agree=agree if teacher else None,
        teacher_mass_out=mass_out if teacher else None,
    )


def _check(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    spec: Distillation,
    vocab: int,
) -> None:
    """Raise where head, ids and spec do not go together."""
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head: give both or neither")
    if teacher_head is None and spec.kd_ratio > 0:
        raise ValueError(f"loss.kd_ratio={spec.kd_ratio}: must be 0 where there is no teacher")
    for name, head in (("student_head", student_head), ("teacher_head", teacher_head)):
        if head is not None and not 1 <= vocab <= len(head.weight):
            raise ValueError(
                f"vocab={vocab}: must lie between 1 and the {len(head.weight)} rows of {name}"
            )


class _FusedSums(torch.autograd.Function):
    """Computes the sums and, in the same pass, the gradients that backward will scale."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher: tuple[Tensor, Head] | None,
        targets: Tensor,
        spec: Distillation,
        vocab: int,
        training: bool,
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight, wants_bias = (
            training and needed for needed in ctx.needs_input_grad[:3]
        )
        device = hidden.device.type
        dtype = _product_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        sums = ChunkSums(wide, hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Sums over tokens: in float32 or more, whatever the dtype of the models.
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if wants_bias and bias is not None else None
        any_gradient = wants_hidden or wants_weight or wants_bias

        with torch.autocast(device, enabled=False):
            head = head.to(dtype)
            if teacher is not None:
                teacher_hidden, teacher_head = teacher[0], teacher[1].to(dtype)
            # One piece of memory for all chunks: asking the system for fresh pages costs as much
            # as the arithmetic on them.
            rows = min(spec.chunk_tokens, len(targets))
            logits = hidden.new_empty(rows, vocab, dtype=wide)
            teacher_logits = torch.empty_like(logits) if teacher is not None else None
            for chunk in _chunks(len(targets), spec.chunk_tokens):
                h = hidden[chunk].to(dtype)
                s = head.logits(h, vocab, out=logits[: len(h)])
                t = None
                if teacher_logits is not None:
                    h_t = teacher_hidden[chunk].to(dtype)
                    t = teacher_head.logits(h_t, vocab, out=teacher_logits[: len(h)])
                    sums.teacher_mass_out += _mass_out(h_t, teacher_head, t, vocab)
                differentiate_chunk(
                    s, t, targets[chunk], spec, sums, gradient=any_gradient, softcap=head.softcap
                )
                if not any_gradient:
                    continue
                # From here on `s` holds the gradient with respect to the logits.
                if head.logit_scale != 1:
                    s.mul_(head.logit_scale)
                if d_bias is not None:
                    d_bias[:vocab] += s.sum(0)
                g = s.to(dtype)
                if d_hidden is not None:
                    d_hidden[chunk] = g @ head.weight[:vocab]
                if d_weight is not None:
                    _accumulate_product(d_weight[:vocab], g, h)

        ctx.save_for_backward(
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        # A weight of 0 must hide an infinite value, which a product with 0 would turn into NaN.
        weighted = [(1 - spec.kd_ratio, sums.ce), (spec.kd_ratio, sums.kd)]
        loss = torch.stack([w * value for w, value in weighted if w > 0]).sum()
        rest = (sums.ce, sums.kd, sums.agree, sums.teacher_mass_out)
        ctx.mark_non_differentiable(*rest)
        return (loss, *rest)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the fused loss has no second derivative: its gradient is made in the forward "
                "pass; differentiate neo.losses.divergences twice instead"
            )
        factor = incoming[0]
        # Looking at the value would make a GPU wait for it; there the product is cheaper.
        unscaled = factor.device.type == "cpu" and factor.item() == 1
        return (
            *(
                saved if saved is None or unscaled else saved * factor.to(saved.dtype)
                for saved in ctx.saved_tensors
            ),
            *(None,) * 6,
        )


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` tokens, in order; none where there are no tokens."""
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else that of the model."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _mass_out(
    hidden: Float[Tensor, "chunk d"], head: Head, logits: Float[Tensor, "chunk vocab"], vocab: int
) -> Float[Tensor, ""]:
    """Probability that the head puts on its rows from `vocab` on, summed over tokens."""
    rows = len(head.weight)
    if rows == vocab:
        return logits.new_zeros(())
    outside = head.between(hidden, vocab, rows).logsumexp(-1)
    return torch.sigmoid(outside - logits.logsumexp(-1)).sum()


def _accumulate_product(
    total: Float[Tensor, "vocab d"],
    logits_gradient: Float[Tensor, "chunk vocab"],
    hidden: Float[Tensor, "chunk d"],
) -> None:
    """Add the gradient of the head's weight from one chunk."""
    if total.dtype == hidden.dtype:
        total.addmm_(logits_gradient.T, hidden)
    else:
        total += logits_gradient.T @ hidden
