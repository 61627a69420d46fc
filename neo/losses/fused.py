"""From hidden states to sums, chunk by chunk: the logits of all tokens never exist at once.

The numbers are those of `neo.losses.divergences`. The gradient is made in the forward pass, while a
chunk's logits are there, so that a frozen student head costs three matrix products a token: student
logits, teacher logits, and gradient times head.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.chunk import ChunkSums, block_rows, differentiate_chunk, kind_of
from neo.losses.distillation import Distillation, TokenSums
from neo.losses.head import Head
from neo.losses.products import add_transposed_times, times, wide

# Where `loss.chunk_gib` is left open. On a CPU, memory is asked of the system anew and filled page
# by page past 32 MiB a tensor, while products of few tokens are slow: as small as the first number
# or as many tokens as the second, whichever is more. A GPU reads the heads once per chunk, which
# takes it as long as the products of hundreds of tokens.
CHUNK_GIB = {"cpu": (3 / 64, 128), "cuda": (1.0, 1)}


def fused_sums(
    student_hidden: Float[Tensor, "tokens d_student"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "tokens d_teacher"] | None,
    teacher_head: Head | None,
    targets: Int64[Tensor, " tokens"],
    spec: Distillation,
    vocab: int,
    *,
    student_branch: Float[Tensor, "tokens r"] | None = None,
    measure: bool = False,
) -> TokenSums:
    """Sums of cross-entropy and divergence over supervised tokens, in nats.

    `loss` carries gradient to `student_hidden`, to `student_branch` and, where they require it, to
    the student head's weight, bias and branch. Both models are compared over the ids in
    [0, `vocab`): heads padded past them are cut and the distributions renormalised, and the
    teacher's probability on what was cut is summed in `teacher_mass_out`.

    Args:
        student_hidden: Hidden states of supervised tokens only.
        student_head: Weight, bias and branch may require gradient.
        teacher_hidden: The teacher's, of the same tokens; None without a teacher.
        teacher_head: Never gets gradient.
        targets: The id each token must predict, in [0, `vocab`).
        spec: Divergence, ratio, temperature and chunk size.
        vocab: How many ids the shared tokenizer has.
        student_branch: Input of the student head's branch, where it has one.
        measure: Compare with the teacher although `kd_ratio` is 0 and gradients are on; without
            gradients that is done anyway.
    """
    _check(student_head, student_branch, teacher_hidden, teacher_head, spec, vocab)
    training = torch.is_grad_enabled()
    if teacher_hidden is None or (spec.kd_ratio == 0 and training and not measure):
        teacher = None
    else:
        assert teacher_head is not None  # both or neither: checked above
        teacher = (teacher_hidden.detach(), teacher_head)
    loss, ce, entropy, kd, agree, teacher_target, mass_out = _FusedSums.apply(
        student_hidden,
        student_branch,
        student_head.weight,
        student_head.bias,
        student_head.branch,
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
        student_entropy=entropy,
        agree=agree if teacher else None,
        teacher_target=teacher_target if teacher else None,
        teacher_mass_out=mass_out if teacher else None,
    )


def _check(
    student_head: Head,
    student_branch: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    spec: Distillation,
    vocab: int,
) -> None:
    """Raise where heads, ids and spec do not go together."""
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head: give both or neither")
    if (student_branch is None) != (student_head.branch is None):
        raise ValueError("student_branch and student_head.branch: give both or neither")
    if teacher_head is not None and teacher_head.branch is not None:
        raise ValueError("teacher_head.branch: must be None, a teacher has no branch")
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
        branch_input: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        branch: Tensor | None,
        head: Head,
        teacher: tuple[Tensor, Head] | None,
        targets: Tensor,
        spec: Distillation,
        vocab: int,
        training: bool,
    ) -> tuple[Tensor, ...]:
        inputs = (hidden, branch_input, weight, bias, branch)
        wanted = [training and needed for needed in ctx.needs_input_grad[: len(inputs)]]
        dtype = _product_dtype(hidden)
        sums = ChunkSums(wide(dtype), hidden.device)
        # What is a sum over tokens is summed in float32 or more, whatever the dtype of the models.
        d_hidden, d_branch_input, d_weight, d_bias, d_branch = gradients = [
            torch.zeros_like(x, dtype=x.dtype if number < 2 else wide(dtype))
            if want and x is not None
            else None
            for number, (x, want) in enumerate(zip(inputs, wanted, strict=True))
        ]

        with torch.autocast(hidden.device.type, enabled=False):
            head = head.to(dtype)
            if teacher is not None:
                teacher_hidden, teacher_head = teacher[0], teacher[1].to(dtype)
            for chunk in _chunks(len(targets), _chunk_tokens(spec, vocab, hidden, teacher)):
                h = hidden[chunk].to(dtype)
                u = None if branch_input is None else branch_input[chunk].to(dtype)
                # The largest tensors there are: none may outlive its use.
                s = head.logits(h, stop=vocab, branch_input=u)
                t = outside = None
                if teacher is not None:
                    h_t = teacher_hidden[chunk].to(dtype)
                    t = teacher_head.logits(h_t, stop=vocab)
                    if len(teacher_head.weight) > vocab:
                        outside = teacher_head.logits(h_t, vocab).logsumexp(-1)
                differentiate_chunk(
                    s,
                    t,
                    targets[chunk],
                    spec,
                    sums,
                    gradient=any(wanted),
                    softcap=head.softcap,
                    outside=outside,
                )
                del t
                if not any(wanted):
                    continue
                # From here on `s` holds the gradient with respect to the logits.
                if head.logit_scale != 1:
                    s.mul_(head.logit_scale)
                if d_hidden is not None:
                    d_hidden[chunk] = times(s, head.weight[:vocab])
                if d_branch_input is not None:
                    assert head.branch is not None
                    d_branch_input[chunk] = times(s, head.branch[:vocab])
                if d_weight is not None:
                    add_transposed_times(d_weight[:vocab], s, h)
                if d_bias is not None:
                    d_bias[:vocab] += s.sum(0)
                if d_branch is not None and u is not None:
                    add_transposed_times(d_branch[:vocab], s, u)
                del s

        ctx.save_for_backward(
            *(
                None if gradient is None or x is None else gradient.to(x.dtype)
                for gradient, x in zip(gradients, inputs, strict=True)
            )
        )
        # A weight of 0 must hide an infinite value, which a product with 0 would turn into NaN.
        weighted = [(1 - spec.kd_ratio, sums.ce), (spec.kd_ratio, sums.kd)]
        loss = torch.stack([w * value for w, value in weighted if w > 0]).sum()
        rest = (
            sums.ce,
            sums.student_entropy,
            sums.kd,
            sums.agree,
            sums.teacher_target,
            sums.teacher_mass_out,
        )
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


def _chunk_tokens(
    spec: Distillation, vocab: int, hidden: Tensor, teacher: tuple[Tensor, Head] | None
) -> int:
    """How many tokens' logits fit into the memory that a chunk may take, at least one."""
    device = hidden.device
    gib, least = CHUNK_GIB.get(kind_of(device), CHUNK_GIB["cuda"])
    if spec.chunk_gib is not None:
        gib, least = spec.chunk_gib, 1
    num_models = 1 if teacher is None else 2
    row = vocab * wide(hidden.dtype).itemsize
    # Beside the logits a block of them is there some five times over, as probabilities and so on.
    budget = gib * 2**30
    tokens = int(budget / ((num_models + 5) * row))
    if tokens > (block := block_rows(vocab, device)):
        tokens = int((budget - 5 * block * row) / (num_models * row))
    return max(least, tokens)


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` tokens and of like length, in order; none if there are no tokens."""
    if tokens == 0:
        return
    size = math.ceil(tokens / math.ceil(tokens / size))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the factors: autocast's where it is on, else that of the model."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
