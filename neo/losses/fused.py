"""From hidden states to sums, chunk by chunk: the logits of all tokens never exist at once.

The numbers are those of `neo.losses.divergences`. The gradient is made in the forward pass, while a
chunk's logits are there, so that a frozen student head costs three matrix products a token: student
logits, teacher logits, and gradient times head. A teacher that gives other numbers than hidden
states costs none of them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from neo.losses.chunk import ChunkSums, block_rows, differentiate_chunk, kind_of
from neo.losses.comparisons import ByLogits, ByMeanLogit, Comparison
from neo.losses.distillation import Distillation, TokenSums, function_of
from neo.losses.divergences import forward_kl
from neo.losses.given import Given, HiddenStates, Listed, Projected, of_tokens
from neo.losses.head import Head
from neo.losses.listed import ByList
from neo.losses.products import (
    add_transposed_times,
    exact_times,
    product_dtype,
    times,
    wide,
)

# Where `loss.chunk_gib` is left open. On a CPU, memory is asked of the system anew and filled page
# by page past 32 MiB a tensor, while products of few tokens are slow: as small as the first number
# or as many tokens as the second, whichever is more. A GPU reads the heads once per chunk, which
# takes it as long as the products of hundreds of tokens.
CHUNK_GIB = {"cpu": (3 / 64, 128), "cuda": (1.0, 1)}


def fused_sums(
    student_hidden: Float[Tensor, "tokens d_student"],
    student_head: Head,
    teacher: Given | None,
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
        teacher: What it gives for the same tokens; None without a teacher.
        targets: The id each token must predict, in [0, `vocab`).
        spec: Divergence, ratio, temperature and chunk size.
        vocab: How many ids the shared tokenizer has.
        student_branch: Input of the student head's branch, where it has one.
        measure: Compare with the teacher although `kd_ratio` is 0 and gradients are on; without
            gradients that is done anyway.
    """
    _check(student_head, student_branch, teacher, spec, vocab)
    training = torch.is_grad_enabled()
    if spec.kd_ratio == 0 and training and not measure:
        teacher = None
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
    teacher: Given | None,
    spec: Distillation,
    vocab: int,
) -> None:
    """Raise where heads, ids and spec do not go together."""
    if (student_branch is None) != (student_head.branch is None):
        raise ValueError("student_branch and student_head.branch: give both or neither")
    if teacher is None and spec.kd_ratio > 0:
        raise ValueError(f"loss.kd_ratio={spec.kd_ratio}: must be 0 where there is no teacher")
    heads = {"student_head": student_head}
    if isinstance(teacher, HiddenStates):
        heads["teacher_head"] = teacher.head
        if teacher.head.branch is not None:
            raise ValueError("teacher_head.branch: must be None, a teacher has no branch")
    for name, head in heads.items():
        if not 1 <= vocab <= len(head.weight):
            raise ValueError(
                f"vocab={vocab}: must lie between 1 and the {len(head.weight)} rows of {name}"
            )
    if isinstance(teacher, Projected | Listed) and teacher.temperature != spec.temperature:
        raise ValueError(
            f"loss.temperature={spec.temperature}: the teacher's numbers are of temperature "
            f"{teacher.temperature}"
        )
    if isinstance(teacher, Projected):
        _check_projected(student_head, spec)


def _check_projected(head: Head, spec: Distillation) -> None:
    """Raise where a mean row of the student's head does not give the divergence."""
    if function_of(spec.divergence) is not forward_kl:
        raise ValueError("loss.divergence: a projected teacher gives forward_kl alone")
    if head.softcap is not None:
        raise ValueError(f"softcap={head.softcap}: mean logits are no product once they are capped")
    trained = any(x is not None and x.requires_grad for x in (head.weight, head.bias))
    if trained or head.branch is not None:
        raise ValueError("student_head: a projected teacher needs the head that it was made with")


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
        teacher: Given | None,
        targets: Tensor,
        spec: Distillation,
        vocab: int,
        training: bool,
    ) -> tuple[Tensor, ...]:
        inputs = (hidden, branch_input, weight, bias, branch)
        wanted = [training and needed for needed in ctx.needs_input_grad[: len(inputs)]]
        dtype = product_dtype(hidden)
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
            comparison = comparisons(teacher, head, hidden, dtype, vocab)
            for chunk in _chunks(len(targets), _chunk_tokens(spec, vocab, hidden, teacher)):
                h = hidden[chunk].to(dtype)
                u = None if branch_input is None else branch_input[chunk].to(dtype)
                # The largest tensors there are: none may outlive its use.
                s = head.logits(h, stop=vocab, branch_input=u)
                differentiate_chunk(
                    s,
                    comparison(chunk),
                    targets[chunk],
                    spec,
                    sums,
                    gradient=any(wanted),
                    softcap=head.softcap,
                )
                if not any(wanted):
                    continue
                # From here on `s` holds the gradient with respect to the logits.
                if head.logit_scale != 1:
                    s.mul_(head.logit_scale)
                if d_hidden is not None:
                    if isinstance(teacher, Projected):
                        # The two are close where the models are: no digit may go before they part.
                        exact = exact_times(s, head.weight[:vocab])
                        factor = spec.kd_ratio * teacher.temperature * head.logit_scale
                        d_hidden[chunk] = exact.sub_(teacher.mean_row[chunk], alpha=factor)
                    else:
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


def comparisons(
    teacher: Given | None, head: Head, hidden: Tensor, dtype: torch.dtype, vocab: int
) -> Callable[[slice], Comparison | None]:
    """What gives the teacher's numbers for one chunk of tokens after another.

    Args:
        teacher: What it gives for all of them.
        head: The student's.
        hidden: The student's.
        dtype: Of the factors of products.
        vocab: How many ids are shared.
    """
    if teacher is None:
        return lambda chunk: None
    if isinstance(teacher, Listed):
        return ByList(teacher).at
    if isinstance(teacher, HiddenStates):
        states, teacher_head = teacher.hidden.detach(), teacher.head.to(dtype)

        def logits(chunk: slice) -> Comparison:
            h = states[chunk].to(dtype)
            outside = None
            t = teacher_head.logits(h, stop=vocab)
            if len(teacher_head.weight) > vocab:
                outside = teacher_head.logits(h, vocab).logsumexp(-1)
            return ByLogits(t, outside)

        return logits

    def mean_logits(chunk: slice) -> Comparison:
        # In float64 where the device has it: losses are differences of these.
        precise = torch.float32 if hidden.device.type == "mps" else torch.float64
        given = of_tokens(teacher, chunk)
        factors = hidden[chunk].to(dtype).to(precise), given.mean_row.to(precise)
        mean = torch.linalg.vecdot(*factors)
        if given.mean_bias is not None:
            mean += given.mean_bias
        mean *= head.logit_scale
        return ByMeanLogit(mean, given.entropy.to(precise), given.facts)

    return mean_logits


def _chunk_tokens(spec: Distillation, vocab: int, hidden: Tensor, teacher: Given | None) -> int:
    """How many tokens' logits fit into the memory that a chunk may take, at least one."""
    device = hidden.device
    gib, least = CHUNK_GIB.get(kind_of(device), CHUNK_GIB["cuda"])
    if spec.chunk_gib is not None:
        gib, least = spec.chunk_gib, 1
    num_models = 2 if isinstance(teacher, HiddenStates) else 1
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
