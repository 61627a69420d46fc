"""KaSA: LoRA with singular values of its own, on a base without its r smallest directions.

Wang et al. 2024, arXiv:2412.06071. The branch is PEFT's, `s B diag(d) A`. What is cut out of the
base is kept here as factors, so that a run can go on, and be exported, from the untouched base.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import KasaLinearVariant
from torch import Tensor, nn


@contextmanager
def base_left_whole() -> Iterator[None]:
    """Within it PEFT attaches KaSA's branch and leaves the base as it is.

    PEFT 0.21 cuts the base while it attaches, keeps nothing of what it cut, and would cut a base
    again that is given to it cut already.
    """
    cut = KasaLinearVariant._truncate_base_weight
    KasaLinearVariant._truncate_base_weight = staticmethod(lambda module, r: None)
    try:
        yield
    finally:
        KasaLinearVariant._truncate_base_weight = staticmethod(cut)


@torch.no_grad()
def smallest_directions(student: nn.Module) -> dict[str, Tensor]:
    """What is to be cut out of each weight, as A and B of a plain LoRA, `s B A`, by their names."""
    found = {}
    for path, layer in student.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter, r in layer.r.items():
                # in float64: what is small beside the largest is what float32 would blur
                weight = layer.get_base_layer().weight.double()
                u, s, v = torch.linalg.svd(weight, full_matrices=False)
                up = u[:, -r:] * s[-r:] / layer.scaling[adapter]
                found[f"{path}.lora_A.weight"] = v[-r:].float().cpu()
                found[f"{path}.lora_B.weight"] = up.float().cpu()
    return found


def fold_singular_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The branch as plain LoRA, whose B is `B diag(d)`."""
    folded = {name: value for name, value in state.items() if not name.endswith(".lora_diag")}
    for name in state.keys() - folded.keys():
        up = name.removesuffix("lora_diag") + "lora_B.weight"
        folded[up] = state[up] * state[name]
    return folded


def kasa_penalty(student: nn.Module) -> Float[Tensor, ""]:
    """What training adds to the loss: singular values small, factors orthogonal.

    `beta * sum(d^2) + gamma * (|A A' - I| + |B' B - I|)` (equations 9 to 11), Frobenius norms, the
    mean over layers as in the authors' code; PEFT's `_get_kasa_loss` is the sum.
    """
    model: Any = student
    layers = sum(isinstance(module, LoraLayer) for module in student.modules())
    return model.base_model._get_kasa_loss() / layers


def kasa_problems(keys: Mapping[str, Any]) -> list[str]:
    """What is wrong with keys for KaSA that would be right for LoRA."""
    start = keys.get("init_lora_weights", True)
    if start is True or start == "gaussian":
        return []
    return [
        f"lora.init_lora_weights={start!r}: must be true or gaussian in KaSA; B has to "
        "begin at zero"
    ]
