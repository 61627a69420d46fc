"""Frozen weights of fewer bits: 4-bit floats, through bitsandbytes (QLoRA, arXiv:2305.14314).

Integer weights are in `integer_weights`; what stands against a config that asks for either is
found here.

Of `peft.prepare_model_for_kbit_training` nothing is needed here. It freezes the base, as attaching
a branch does. It makes norms, embedding and head float32; but norms of transformers compute in
float32 whatever they are stored in, and the head's is the largest product of the loss. Its hook for
recomputed activations is for PyTorch's reentrant way, which is not ours.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from neo.models.integer_weights import INTEGERS, integer_problems

KINDS = ("nf4", "fp4")
OLDEST = "0.50"  # bitsandbytes
ON_CUDA = ("auto", "cuda", "gpu")
# Lightning's names of a precision that keeps what is trained in float32, by the dtype of the base.
PRECISIONS = {"float16": ("32-true", "16-mixed"), "float32": ("32-true", "bf16-mixed", "16-mixed")}
BF16_PRECISIONS = ("32-true", "bf16-mixed")
ALIASES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def four_bit(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is given to make linear layers 4-bit as it reads them.

    transformers leaves the head and whatever is tied to it as they are, which the loss relies on.

    Args:
        kind: One of `KINDS`; the constants of its blocks are quantised once more.
        dtype: In which weights are multiplied, and in which all other weights are stored.
        device: Where weights are quantised and stay; in full precision they would not all fit.

    Raises:
        ValueError: bitsandbytes is missing.
    """
    if problem := _lacking():
        raise ValueError(f"quantization={kind!r}: {problem}")
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "device_map": {"": device},
    }


def keep_layout(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from rearranging weights on a CPU at the first forward in eval mode.

    On CPUs with bf16 instructions its version 0.50 would do so for good, after which gradients are
    wrong and nothing says so.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every 4-bit weight as the number that it stands for, all in float32."""
    exact = {
        name: _stands_for(module.weight)
        for name, module in model.named_modules()
        if hasattr(module, "weight") and getattr(module.weight, "quant_state", None) is not None
    }
    # It warns of the dtype that it was asked for.
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    model.dequantize(dtype=torch.float32)
    for name, weight in exact.items():
        cast(Any, model.get_submodule(name)).weight.data = weight
    return model.float()


def _stands_for(weight: Any) -> Float[Tensor, "out in"]:
    """What 4-bit codes stand for: a level of the kind, times the largest weight of the block.

    Read off the codes here, since on CPUs with AVX-512 bitsandbytes 0.50 gives the wrong numbers
    where a row is no whole number of blocks.
    """
    from bitsandbytes.functional import dequantize_blockwise

    state = weight.quant_state
    largest = state.absmax
    if state.nested:
        largest = dequantize_blockwise(largest, state.state2) + state.offset
    packed = weight.data.view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
    values = state.code.float()[codes][: state.shape.numel()]
    blocks = torch.arange(len(values), device=values.device) // state.blocksize
    return (values * largest.float().flatten()[blocks]).view(state.shape)


def quantization_problems(config: Mapping[str, Any], *, here: bool = True) -> Iterator[str]:
    """What stands against the quantised models that a run's config asks for.

    Groups that are wrong by themselves are others' to report. Whether the run is for this machine
    (`here`) decides whether that is looked at.
    """
    if not isinstance(config["trainer"], Mapping):
        return
    for role, kinds in (("student", KINDS), ("teacher", (*KINDS, *INTEGERS))):
        kind = config[role].get("quantization")
        if kind not in kinds or config[role].get("path") is None:
            continue
        problems = _four_bit_problems if kind in KINDS else _integer_problems
        for problem in problems(config, role) if here else ():
            yield f"{role}.quantization={kind!r}: {problem}"
        if role == "teacher":
            for problem in _sharding_problems(config):
                yield f"teacher.quantization={kind!r}: {problem}"
        else:
            for problem in _student_problems(config):
                yield f"student.quantization={kind!r}: {problem}"


def _four_bit_problems(config: Mapping[str, Any], role: str) -> Iterator[str]:
    if problem := _lacking():
        yield problem
    own = _own_device(config, role)
    if own is None:
        if problem := _no_device(config["trainer"].get("accelerator", "auto")):
            yield problem
    elif not own.startswith("cuda"):
        yield (
            f"needs a CUDA device, and teacher.device={own!r} is none; use teacher.device=null "
            "or one such as cuda:1, quantization=int8, or quantization=null"
        )


def _integer_problems(config: Mapping[str, Any], role: str) -> Iterator[str]:
    own = _own_device(config, role)
    accelerator = _device_type(config["trainer"].get("accelerator", "auto"))
    device_type = accelerator if own is None else own.split(":")[0]
    if device_type == "cuda" and not torch.cuda.is_available():
        return  # the trainer, or the teacher's device, is refused
    precision = str(config["trainer"].get("precision"))
    # autocast is for the student's kind of device, Lightning's casts are for what it moves
    reached = own is None or (device_type == accelerator and precision.endswith("-mixed"))
    yield from integer_problems(
        config[role]["quantization"],
        str(config[role].get("dtype", "auto")),
        device_type,
        ALIASES.get(precision, precision) if reached else None,
    )


def _sharding_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Why a quantised teacher cannot lie in shards: FSDP shards plain tensors of floats only."""
    keys = []
    if config["trainer"].get("strategy") == "fsdp":
        keys.append("trainer.strategy=fsdp")
    if config.get("sharding") == "teacher":
        keys.append("sharding=teacher")
    for key in keys:
        yield (
            f"{key} shards weights in floats, not quantised ones; they are small: use trainer=ddp "
            "and sharding=null, which replicate the teacher, or teacher.quantization=null"
        )


def _own_device(config: Mapping[str, Any], role: str) -> str | None:
    device = config[role].get("device") if role == "teacher" else None
    return device if isinstance(device, str) else None


def _device_type(accelerator: Any) -> str:
    """The torch device that Lightning takes."""
    if accelerator in ON_CUDA and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu") and torch.backends.mps.is_available():
        return "mps"
    return "cpu" if accelerator == "auto" else str(accelerator).replace("gpu", "cuda")


def _student_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config["lora"].get("_target_") == "neo.models.variants.none":
        yield (
            "lora=none trains all weights, and 4-bit weights are frozen; choose a variant, "
            "or student.quantization=null"
        )
    if config["lora"].get("_target_") == "neo.models.variants.kasa":
        yield (
            "lora=kasa cuts its base, which has to be in full precision; choose another variant, "
            "or student.quantization=null"
        )
    start = config["lora"].get("init_lora_weights", True)
    if not isinstance(start, bool) and start != "gaussian":
        yield (
            f"lora.init_lora_weights={start!r} is computed from or with base weights in full "
            "precision; use true or gaussian, or student.quantization=null"
        )
    dtype = config["student"].get("dtype", "auto")
    precision = str(config["trainer"].get("precision"))
    legal = PRECISIONS.get(str(dtype), BF16_PRECISIONS)
    if ALIASES.get(precision, precision) not in legal:
        yield (
            f"trainer.precision={precision!r} does not go with student.dtype={dtype!r} and "
            f"a float32 branch; use {' or '.join(legal)}"
        )


def _lacking() -> str | None:
    if is_bitsandbytes_available(OLDEST):
        return None
    return f"needs bitsandbytes, version {OLDEST} or later; pip install 'llm-neo[quant]'"


def _no_device(accelerator: Any) -> str | None:
    if accelerator in ON_CUDA and torch.cuda.is_available():
        return None
    where = "this machine has none" if accelerator in ON_CUDA else "that is none"
    return (
        f"needs a CUDA device, and with trainer.accelerator={accelerator!r} {where}; use "
        "trainer=gpu on a machine with one, or quantization=null"
    )
