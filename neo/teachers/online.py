"""A teacher that runs beside the student."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed import DeviceMesh
from transformers import PreTrainedModel

from neo.models.causal_lm import CausalLM
from neo.models.integer_weights import (
    GROUP_SIZE,
    GROUP_SIZES,
    INTEGERS,
    check_fit,
    integer_weights,
)
from neo.models.quantization import KINDS
from neo.models.sharding import sharded_teacher
from neo.teachers.device import device_of
from neo.teachers.keeping import Keeping


@dataclass(frozen=True, kw_only=True)
class OnlineTeacher(Keeping, CausalLM):
    """A causal LM whose hidden states are computed as they are needed; `path=null` is no teacher.

    Args:
        quantization: nf4 or fp4, as a student's; or int8 or int4, through torchao, which run on a
            CPU as well. The head and the embedding stay in `dtype`, whose `auto` is bfloat16 for
            int4, as its products are.
        quantization_group_size: Weights of a row that share a scale, of int4: 32, 64 or 128. None
            is 32, the most exact.
        device: Such as `cpu` or `cuda:1`: where the backbone stays and computes. Only hidden states
            of supervised tokens leave it; the head is where the student is. None: all of it is.
            On another kind of device than the student's it computes in `dtype`, whatever the
            trainer's precision.
        allow_tokenizer_differences: Report what differs from the student's tokenizer instead of
            refusing it: for pairs that differ in names only, such as a base model's eos token
            against an instruction-tuned one's. The student's ids are given to both models.
        offload: Keep its weights in the CPU's memory and copy each layer to the device as it is
            needed; where the teacher is split over processes.

    What is kept of it in a cache stands in `neo.teachers.keeping`.
    """

    quantizations: ClassVar[tuple[str, ...]] = (*KINDS, *INTEGERS)

    quantization_group_size: int | None = None
    device: str | None = None
    allow_tokenizer_differences: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_keeping()
        size = self.quantization_group_size
        if size is not None and self.quantization != "int4":
            raise ValueError(
                f"quantization_group_size={size!r}: is of quantization=int4, and that is "
                f"{self.quantization!r}; leave it out"
            )
        if size is not None and size not in GROUP_SIZES:
            raise ValueError(
                f"quantization_group_size={size!r}: must be null or one of "
                f"{', '.join(map(str, GROUP_SIZES))}"
            )
        if self.device is not None and device_of(self.device) is None:
            raise ValueError(
                f"device={self.device!r}: must be null, or a device such as cpu or cuda:1"
            )

    @property
    def group_size(self) -> int:
        """How many weights of a row share a scale, where they are int4."""
        return self.quantization_group_size or GROUP_SIZE

    def meta(self) -> PreTrainedModel:
        """As a student's; besides, its shapes are those that its quantisation takes."""
        return self._fitting(torch.device("meta"))

    def _fitting(self, device: torch.device) -> PreTrainedModel:
        model = super().meta()
        if self.quantization in INTEGERS:
            check_fit(model, self.quantization, self.group_size, device)
        return model

    def weight_dtype(self, device: torch.device) -> torch.dtype:
        """As a student's, but for what int4 computes in."""
        automatic = self.quantization == "int4" and self.dtype == "auto"
        return torch.bfloat16 if automatic else super().weight_dtype(device)

    def _quantized(self, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        if self.quantization not in INTEGERS:
            return super()._quantized(dtype, device)
        self._fitting(device)
        return integer_weights(self.quantization, device, self.group_size)

    def load_frozen(self, device: torch.device, mesh: DeviceMesh | None = None) -> "FrozenTeacher":
        """The teacher's model: frozen, in eval mode for good; split over the mesh if there is one.

        Args:
            device: The student's.
            mesh: Of the processes that each hold a part.
        """
        if mesh is not None:
            return FrozenTeacher(sharded_teacher(self, mesh, offload=self.offload), stays=True)
        own = device_of(self.device)
        return FrozenTeacher(self.load(own or device, trained=False), own)


class FrozenTeacher(nn.Module):
    """Holds a model that never trains: no gradients, no train mode, no place in a checkpoint.

    Args:
        model: Any causal LM.
        device: Where its backbone is brought and stays, wherever this module is moved; its head is
            moved. None: all of it is moved.
        stays: Nothing of it is moved: its parts are on their device, or in the CPU's memory.
    """

    model: PreTrainedModel

    def __init__(
        self, model: PreTrainedModel, device: torch.device | None = None, *, stays: bool = False
    ) -> None:
        super().__init__()
        self.stays = stays
        model.requires_grad_(False).eval()
        if device is None:
            self.model = model
        else:
            self.head = _own_head(model)
            model.to(device)
            model.get_decoder().register_forward_pre_hook(_bring_inputs(device), with_kwargs=True)
            self.__dict__["model"] = model  # and no submodule, so that nothing moves it

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenTeacher":
        return self if self.stays else super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in eval mode, whatever its parent does: dropout would make a noisy teacher."""
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing: a checkpoint holds what was trained."""
        return {}


def _own_head(model: PreTrainedModel) -> nn.Module:
    """The model's head, with a weight of its own where it shared the embedding's."""
    head: Any = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return head


def _bring_inputs(device: torch.device) -> Any:
    """A hook that lets a backbone take token ids from any device."""

    def bring(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def there(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return tuple(map(there, args)), {key: there(value) for key, value in kwargs.items()}

    return bring
