"""Frozen linear layers multiplied by the faster way that a CPU offers."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neo.losses.products import by_onednn, times, times_transposed


class FrozenLinear(nn.Linear):
    """A linear layer whose weights get no gradient: `neo.losses.products` where that is faster."""

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The layer's output, with gradient to its input."""
        if (
            not by_onednn(input, self.weight)
            or torch.is_autocast_enabled("cpu")
            or self.weight.requires_grad
        ):
            return super().forward(input)
        output = _Product.apply(input, self.weight)
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """`input @ weight.T` with gradient to the input alone."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        output = times_transposed(input.reshape(-1, input.shape[-1]), weight)
        return output.view(*input.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        of_input = times(gradient.reshape(-1, gradient.shape[-1]), weight)
        return of_input.view(*gradient.shape[:-1], -1), None


def speed_up_frozen(backbone: nn.Module) -> None:
    """Makes every frozen `nn.Linear` in the backbone a `FrozenLinear`, in place.

    torchao's quantised weights are a subclass of tensors in a plain `nn.Linear`: those stay.
    """
    for module in backbone.modules():
        plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
        if plain and not module.weight.requires_grad:
            module.__class__ = FrozenLinear
