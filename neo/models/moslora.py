"""MoSLoRA: LoRA with a trained mixer between its factors, `W0 + s B W A` (arXiv:2406.11909)."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

Mixer = Literal["kaiming", "orthogonal", "identity"]
MIXERS: tuple[str, ...] = get_args(Mixer)


@dataclass
class MoSLoRAConfig(LoraConfig):
    """PEFT's keys for LoRA, and how the mixer begins.

    Args:
        mixer: kaiming (uniform, a = sqrt 5, as A begins), orthogonal, or identity (the first step
            is then LoRA's). Zeros are no choice: B is zero too, so that nothing would ever move.
    """

    # As a variant of its own it is refused by layers that know nothing of it, such as embeddings.
    mixer: Mixer = field(default="kaiming", metadata={"is_lora_variant": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module({nn.Linear: MoSLoRALinear})


class MoSLoRAVariant(LoraVariant):
    """The mixer of one layer, as PEFT asks for what its own variants do."""

    @staticmethod
    def init(module: LoraLinear, adapter_name: str, config: MoSLoRAConfig, **_: Any) -> None:
        """Adds the mixer to the layer, drawn in float32 as A and B are."""
        r, down = module.r[adapter_name], module.lora_A[adapter_name].weight
        mixer = nn.Linear(r, r, bias=False)
        if config.mixer == "kaiming":
            nn.init.kaiming_uniform_(mixer.weight, a=math.sqrt(5))
        elif config.mixer == "orthogonal":
            nn.init.orthogonal_(mixer.weight)
        else:
            nn.init.eye_(mixer.weight)
        module.lora_mixer[adapter_name] = mixer.to(down.device, down.dtype)

    @staticmethod
    def forward(
        module: LoraLinear,
        active_adapter: str,
        x: Float[Tensor, "*batch in"],
        result: Float[Tensor, "*batch out"],
        **_: Any,
    ) -> Float[Tensor, "*batch out"]:
        """The layer's output: the base's `result` and `s B W A dropout(x)`."""
        states = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        mixed = module.lora_mixer[active_adapter](states)
        return result + module.lora_B[active_adapter](mixed) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(
        module: LoraLinear, active_adapter: str, orig_weight: Float[Tensor, "out in"]
    ) -> Float[Tensor, "out in"]:
        """The weight with the branch added, as a new tensor."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(
        module: LoraLinear, active_adapter: str, orig_weight: Float[Tensor, "out in"]
    ) -> None:
        """Adds the branch to the weight in place."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(
        module: LoraLinear, active_adapter: str, orig_weight: Float[Tensor, "out in"]
    ) -> Float[Tensor, "out in"]:
        """The weight without the branch that was added to it."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class MoSLoRALinear(LoraLinear):
    """PEFT's LoRA on a linear layer, with room for mixers (`lora_mixer`) beside A and B."""

    adapter_layer_names = (*LoraLinear.adapter_layer_names, "lora_mixer")

    def resolve_lora_variant(self, *, config: LoraConfig, **keys: Any) -> LoraVariant | None:
        """What an adapter on this layer is: one with a mixer, or any of PEFT's."""
        if isinstance(config, MoSLoRAConfig):
            return MoSLoRAVariant()
        return super().resolve_lora_variant(config=config, **keys)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter to the layer."""
        if not hasattr(self, "lora_mixer"):
            self.lora_mixer = nn.ModuleDict()
        super().update_layer(adapter_name, *args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Float[Tensor, "out in"]:
        """What the adapter adds to the weight: `s B W A`, in the dtype of B."""
        if adapter not in self.lora_mixer:
            return super().get_delta_weight(adapter)
        up, down = self.lora_B[adapter].weight, self.lora_A[adapter].weight
        mixer = cast(nn.Linear, self.lora_mixer[adapter])
        mixed = _mix(up, mixer.weight)
        return (mixed @ down.to(mixed.dtype) * self.scaling[adapter]).to(up.dtype)


def is_moslora(student: nn.Module) -> bool:
    """Whether a student's branch has mixers."""
    return isinstance(student, PeftModel) and isinstance(student.active_peft_config, MoSLoRAConfig)


def fold_moslora(peft_model: PeftModel) -> tuple[dict[str, Tensor], LoraConfig]:
    """The branch as plain LoRA of the same rank and scaling, whose B is `B W`.

    Returns:
        The tensors by the names they have in `adapter_model.safetensors`, and the config that
        belongs in `adapter_config.json` beside them. The model itself stays as it is.
    """
    state = get_peft_model_state_dict(
        peft_model, adapter_name=peft_model.active_adapter, save_embedding_layers=False
    )
    for name in [name for name in state if name.endswith(".lora_mixer.weight")]:
        mixer, up = state.pop(name), name.replace(".lora_mixer.", ".lora_B.")
        state[up] = _mix(state[up], mixer).to(state[up].dtype)
    config = peft_model.active_peft_config
    plain = LoraConfig(
        **{
            key.name: copy.deepcopy(getattr(config, key.name))
            for key in fields(LoraConfig)
            if key.init
        }
    )
    plain.inference_mode = True
    return state, plain


def moslora_problems(keys: Mapping[str, Any]) -> list[str]:
    """What is wrong with keys for MoSLoRA that would be right for LoRA."""
    mixer, start = keys.get("mixer", MIXERS[0]), keys.get("init_lora_weights", True)
    problems = []
    if mixer not in MIXERS:
        problems.append(f"lora.mixer={mixer!r}: must be one of {', '.join(MIXERS)}")
    if start is not True and start != "gaussian":
        problems.append(
            f"lora.init_lora_weights={start!r}: must be true or gaussian with a mixer; B has to "
            "begin at zero, or the model would change when the branch is attached"
        )
    return problems


def _mix(up: Float[Tensor, "out r"], mixer: Float[Tensor, "r r"]) -> Float[Tensor, "out r"]:
    """`B W`, in float32 at least: half precision would round what training never rounded."""
    dtype = torch.promote_types(up.dtype, torch.float32)
    return up.to(dtype) @ mixer.to(dtype)
