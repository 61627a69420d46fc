"""A teacher that runs beside the student."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from neo.models.causal_lm import CausalLM


@dataclass(frozen=True, kw_only=True)
class OnlineTeacher(CausalLM):
    """A causal LM whose hidden states are computed as they are needed; `path=null` is no teacher.

    Args:
        allow_tokenizer_differences: Report what differs from the student's tokenizer instead of
            refusing it: for pairs that differ in names only, such as a base model's eos token
            against an instruction-tuned one's. The student's ids are given to both models.
    """

    allow_tokenizer_differences: bool = False

    def load_frozen(self, device: torch.device) -> "FrozenTeacher":
        """The teacher's model: frozen, in eval mode for good."""
        return FrozenTeacher(self.load(device, trained=False))


class FrozenTeacher(nn.Module):
    """Holds a model that never trains: no gradients, no train mode, no place in a checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in eval mode, whatever its parent does: dropout would make a noisy teacher."""
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing: a checkpoint holds what was trained."""
        return {}
