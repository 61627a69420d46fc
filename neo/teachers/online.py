"""A teacher that runs beside the student."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import DeviceMesh
from transformers import PreTrainedModel

from neo.models.causal_lm import CausalLM
from neo.models.sharding import sharded_teacher


@dataclass(frozen=True, kw_only=True)
class OnlineTeacher(CausalLM):
    """A causal LM whose hidden states are computed as they are needed; `path=null` is no teacher.

    Args:
        allow_tokenizer_differences: Report what differs from the student's tokenizer instead of
            refusing it: for pairs that differ in names only, such as a base model's eos token
            against an instruction-tuned one's. The student's ids are given to both models.
        offload: Keep its weights in the CPU's memory and copy each layer to the device as it is
            needed; where the teacher is split over processes.
    """

    allow_tokenizer_differences: bool = False
    offload: bool = False

    def load_frozen(self, device: torch.device, mesh: DeviceMesh | None = None) -> "FrozenTeacher":
        """The teacher's model: frozen, in eval mode for good; split over the mesh if there is one.

        Args:
            device: Decides what `dtype="auto"` means.
            mesh: Of the processes that each hold a part.
        """
        if mesh is None:
            return FrozenTeacher(self.load(device, trained=False))
        return FrozenTeacher(sharded_teacher(self, mesh, offload=self.offload))


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
