"""LoRA-FA: LoRA whose A stays as it was drawn, so that only B is trained (arXiv:2308.03303)."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def freeze_a(student: nn.Module) -> nn.Module:
    """The student, with A of every linear layer's branch frozen.

    This is the method of the paper's first version (2023): the gradient of B is used as it is.
    The second version (2026) and PEFT's `LoraFAOptimizer` multiply it by `inv(A A')`, divided by
    the squared scaling, before Adam sees it; where the rows of A are orthogonal and of one length
    that changes nothing, as Adam does not heed the size of a gradient.
    On an embedding A begins at zero, so freezing it would keep B from learning: A trains there.

    Raises:
        ValueError: There is no A to freeze.
    """
    frozen = [p for name, p in student.named_parameters() if "lora_A" in name.split(".")]
    if not frozen:
        raise ValueError(
            "lora.target_modules: LoRA-FA freezes A of linear layers, and no branch is on one"
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    return student


def lora_fa_problems(keys: Mapping[str, Any]) -> list[str]:
    """What is wrong with keys for LoRA-FA that would be right for LoRA."""
    start = keys.get("init_lora_weights", True)
    if start is True or start == "gaussian":
        return []
    return [
        f"lora.init_lora_weights={start!r}: must be true or gaussian in LoRA-FA; checkpoints hold "
        "what is trained, so that a frozen A has to follow from the seed alone"
    ]
