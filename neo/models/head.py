"""The output head of a causal LM: its weight, bias and LoRA branch, and what follows them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

# What a model may do to the products of its head before it calls them logits, by the key of its
# config. A model that does anything else is found out by `hidden.check_head`.
FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3; Inkling
# Gemma 2, NanoChat and others; RecurrentGemma; xLSTM
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# HyperCLOVA X multiplies by what the others of its key divide by.
MULTIPLIES_BY = {"hyperclovax": ("logits_scaling",)}

LEGAL = (
    "legal are a plain torch.nn.Linear, one plain LoRA branch on it (lm_head in "
    "lora.target_modules), or a trained copy of it (lora.modules_to_save=[lm_head])"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraBranch:
    """LoRA on a head: its products gain `dropout(hidden) A' up'`.

    Args:
        dropout: Of the hidden states, in the branch alone.
        down: A.
        up: B times LoRA's scaling.
    """

    dropout: nn.Module
    down: Float[Tensor, "r d"]
    up: Float[Tensor, "rows r"]

    def states(self, hidden: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens r"]:
        """What `up` is multiplied with, in the dtype of the branch, as PEFT computes it."""
        return nn.functional.linear(self.dropout(hidden.to(self.down.dtype)), self.down)


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputHead:
    """How a model makes logits: `softcap * tanh(scale * (hidden W' + b + lora) / softcap)`.

    Args:
        weight: One row per id.
        bias: Added to the products, where the model has one.
        lora: Added to the products, where the head is adapted.
        logit_scale: Factor on their sum.
        softcap: Bound on the size of a logit, None where there is none.
    """

    weight: Float[Tensor, "rows d"]
    bias: Float[Tensor, " rows"] | None
    lora: LoraBranch | None
    logit_scale: float
    softcap: float | None

    def products(self, hidden: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens rows"]:
        """What the head gives before scale and soft cap."""
        products = nn.functional.linear(hidden, self.weight, self.bias)
        if self.lora is not None:
            products = products + self.lora.states(hidden) @ self.lora.up.T
        return products

    def bounded(self, products: Float[Tensor, "*tokens rows"]) -> Float[Tensor, "*tokens rows"]:
        """The logits, of what the head gave."""
        logits = products * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def head_of(model: PreTrainedModel) -> OutputHead:
    """The model's output embedding, in the parts whose gradients can be computed in chunks.

    Where the model is split over processes, all of them must call: each gets the whole head, whose
    gradient goes back as the mean over the processes.

    Raises:
        ValueError: It is neither a plain linear layer, nor one with a plain LoRA branch, nor a
            trained copy of one.
    """
    module: Any = model.get_output_embeddings()
    problem, lora = None, None
    if _branch_on_tied(model, module):
        problem = (
            "is tied to its embedding, and a branch on either would be merged into both; leave "
            "lm_head and embed_tokens out of lora.target_modules, or train a copy "
            "(lora.modules_to_save=[lm_head])"
        )
    elif isinstance(module, ModulesToSaveWrapper):
        if module.disable_adapters or len(module.active_adapters) != 1:
            problem = f"has a trained copy that is switched off; {LEGAL}"
        else:
            module = module.modules_to_save[module.active_adapters[0]]
    elif type(module) is LoraLinear:
        if excess := _lora_excess(module):
            problem = f"has {excess}; {LEGAL}"
        else:
            lora, module = _branch(module), module.base_layer
    if problem is None and type(module) is not nn.Linear:
        problem = f"is a {type(module).__module__}.{type(module).__qualname__}; {LEGAL}"
    if problem is not None:
        raise ValueError(f"the head of {type(model).__name__} {problem}")
    weight = module.weight
    if getattr(model, "head_is_embedding", False):  # and gathered, or not, with the backbone
        weight = model.get_input_embeddings().weight
    return OutputHead(
        weight=whole(weight),
        bias=None if module.bias is None else whole(module.bias),
        lora=lora,
        logit_scale=_scale(model),
        softcap=_softcap(model),
    )


def whole(weight: Tensor) -> Tensor:
    """The weight, gathered from the processes it is split over, if it is."""
    return _Whole.apply(weight) if isinstance(weight, DTensor) else weight


@contextmanager
def gathered(module: nn.Module, *, frozen: bool = True) -> Iterator[None]:
    """Within it what a module is made of is whole, where it is split over processes.

    All of them must enter.

    Args:
        module: Neither called nor changed elsewhere meanwhile.
        frozen: Gather what does not train, too.
    """
    split = [
        (owner, name, weight)
        for owner in module.modules()
        for name, weight in owner._parameters.items()
        if isinstance(weight, DTensor) and (frozen or weight.requires_grad)
    ]
    for owner, name, weight in split:
        owner._parameters[name] = cast(nn.Parameter, whole(cast(Tensor, weight)))
    try:
        yield
    finally:
        for owner, name, weight in split:
            owner._parameters[name] = weight


class _Whole(torch.autograd.Function):
    """Gathers a weight; its gradient is the mean of those of the processes, as FSDP's is."""

    @staticmethod
    def forward(ctx: Any, weight: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = weight.device_mesh, weight.placements
        # parts in the CPU's memory are gathered on the device
        return cast(DTensor, weight.to(ctx.mesh.device_type)).full_tensor()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> DTensor:
        mean = gradient / ctx.mesh.size()
        partial = DTensor.from_local(mean, ctx.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=ctx.placements)


def _branch_on_tied(model: PreTrainedModel, head: Any) -> bool:
    """Whether head or embedding has an adapter while both have one weight.

    Their logits would be right, but PEFT 0.21 adds such a branch into the shared weight.
    """
    if not hasattr(model, "peft_config"):
        return False
    layers = (head, model.get_input_embeddings())
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return False
    weights = [getattr(getattr(layer, "base_layer", layer), "weight", None) for layer in layers]
    return weights[0] is not None and weights[0] is weights[1]


def _branch(module: LoraLinear) -> LoraBranch:
    (adapter,) = _adapters(module)
    return LoraBranch(
        dropout=module.lora_dropout[adapter],
        down=whole(module.lora_A[adapter].weight),
        up=whole(module.lora_B[adapter].weight) * module.scaling[adapter],
    )


def _adapters(module: LoraLinear) -> list[str]:
    """The active adapters that the layer has."""
    return [name for name in module.active_adapters if name in module.lora_A]


def _lora_excess(module: LoraLinear) -> str | None:
    """What a LoRA layer is besides a linear layer, A, B, a scaling and a dropout."""
    if module.merged:
        return "a LoRA branch that is merged into it"
    if module.disable_adapters:
        return "a LoRA branch that is switched off"
    adapters = _adapters(module)
    if len(adapters) != 1:
        return f"{len(adapters)} active adapters ({', '.join(adapters) or 'none'})"
    (adapter,) = adapters
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
        return f"a LoRA branch of the variant {variant}"
    if module.lora_bias[adapter]:
        return "a LoRA branch with a bias of its own (lora.lora_bias=true)"
    if type(module.base_layer) is not nn.Linear:
        base = type(module.base_layer)
        return f"a LoRA branch on a {base.__module__}.{base.__qualname__}"
    return None


def _scale(model: PreTrainedModel) -> float:
    """The factor of the model's config on its products."""
    config = model.config.get_text_config()
    inverted = MULTIPLIES_BY.get(config.model_type, ())
    scale = 1.0
    for key in (*FACTORS, *DIVISORS):
        value = getattr(config, key, None)
        if value is not None:
            multiplies = key in FACTORS or key in inverted
            scale = scale * value if multiplies else scale / value
    return float(scale)


def _softcap(model: PreTrainedModel) -> float | None:
    """The bound of the model's config on its logits."""
    config = model.config.get_text_config()
    caps = [cap for key in SOFTCAPS if (cap := getattr(config, key, None)) is not None]
    return float(caps[0]) if caps else None
