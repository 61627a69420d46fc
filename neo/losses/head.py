"""The last step of a model: from hidden states to logits."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from neo.losses.products import times_transposed


@dataclass(frozen=True, kw_only=True)
class Head:
    """How a model makes logits: `softcap * tanh(scale * (h W' + u B' + b) / softcap)`.

    Args:
        weight: W, one row per id; rows past the tokenizer's ids are padding.
        bias: b, added to the products, where the model has one.
        branch: B of a LoRA branch on the head, times its scaling, where there is one; u is A times
            the hidden states, after the branch's dropout.
        logit_scale: Factor on the logits (Cohere's `logit_scale`, one over Granite's
            `logits_scaling`).
        softcap: Bound on the size of a logit (Gemma 2's `final_logit_softcapping`).
    """

    weight: Float[Tensor, "rows d"]
    bias: Float[Tensor, " rows"] | None = None
    branch: Float[Tensor, "rows r"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap}: must be above 0, or None")

    def logits(
        self,
        hidden: Float[Tensor, "chunk d"],
        start: int = 0,
        stop: int | None = None,
        *,
        branch_input: Float[Tensor, "chunk r"] | None = None,
    ) -> Float[Tensor, "chunk vocab"]:
        """Logits over the ids in [start, stop), in float32 or float64; without gradient.

        Args:
            hidden: Hidden states after the model's last norm, in the dtype of the weight.
            start: First id.
            stop: One past the last id; None is the last row's.
            branch_input: u, where the head has a branch.
        """
        ids = slice(start, stop)
        logits = times_transposed(hidden, self.weight[ids])
        if self.branch is not None:
            if branch_input is None:
                raise ValueError("branch_input=None: this head has a branch, which needs its input")
            logits.add_(times_transposed(branch_input, self.branch[ids]))
        if self.bias is not None:
            logits.add_(self.bias[ids])
        if self.logit_scale != 1:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head without gradient, in a dtype; a copy only where that is another."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype)

        weight = self.weight.detach().to(dtype)
        return replace(self, weight=weight, bias=cast(self.bias), branch=cast(self.branch))
