"""A frozen backbone of 8- or 4-bit integer weights, through torchao; activations stay as they are.

They are for teachers. Without gradient nothing stands against them; but the product of 4-bit
weights has no gradient at all, and that of 8-bit ones keeps each weight in full for the backward
pass, which is the memory that was to be saved.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.utils import is_torchao_available

INTEGERS = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)  # of int4: what has kernels on a CPU and on a GPU
GROUP_SIZE = 32
OLDEST = "0.18"  # torchao
# What its 4-bit products ask of a weight's rows on a CPU.
CPU_ROWS = 16
# Lightning's precisions under which activations on a CPU are as int4 needs them.
CPU_PRECISIONS = ("32-true", "bf16-mixed")


def integer_weights(kind: str, device: torch.device, group_size: int) -> dict[str, Any]:
    """What `from_pretrained` is given to make linear layers integer as it reads them.

    transformers leaves the head and whatever is tied to it as they are, which the loss relies on.

    Args:
        kind: `int8`: one scale for each row of a weight, symmetric about 0. `int4`: a scale and an
            offset for each group of weights within a row.
        device: Where weights are quantised and stay; in full precision they would not all fit.
        group_size: Of int4.

    Raises:
        ValueError: torchao is missing.
    """
    if problem := lacking():
        raise ValueError(f"quantization={kind!r}: {problem}")
    config = _int8() if kind == "int8" else _int4(device, group_size)
    return {"quantization_config": TorchAoConfig(config), "device_map": {"": device}}


# set_inductor_config=False: by default either config sets how torch.compile works for the whole
# process, the student with it.
def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def _int4(device: torch.device, group_size: int) -> Any:
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    from torchao.quantization import Int4WeightOnlyConfig

    return Int4WeightOnlyConfig(
        group_size=group_size,
        int4_packing_format="tile_packed_to_4d",  # the one whose products come with torch
        set_inductor_config=False,
    )


def check_fit(meta: PreTrainedModel, kind: str, group_size: int, device: torch.device) -> None:
    """Checks that the backbone can be quantised; torchao would skip what does not fit, silently.

    Args:
        meta: The model; its shapes are enough.
        kind: One of `INTEGERS`.
        group_size: Of int4.
        device: Where its products are to be computed; the meta device where that is not known.

    Raises:
        ValueError: A linear layer's shape does not fit, or most weights lie in no linear layer.
    """
    backbone = meta.get_decoder()
    layers = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.Linear)}
    embeddings = {id(p) for m in backbone.modules() if isinstance(m, nn.Embedding)
                  for p in m.parameters()}  # fmt: skip
    others = [p for p in backbone.parameters() if id(p) not in embeddings]
    num_weights, num_linear = (
        sum(weight.numel() for weight in weights)
        for weights in (others, [layer.weight for layer in layers.values()])
    )
    if num_linear < num_weights / 2:
        raise ValueError(
            f"quantization={kind!r}: of the {num_weights} weights between embedding and head only "
            f"{num_linear} lie in linear layers, the others would stay as they are; use "
            "quantization=null"
        )
    if kind != "int4":
        return
    for name, layer in layers.items():
        rows, columns = layer.weight.shape
        if columns % group_size:
            fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
            other = f"quantization_group_size={' or '.join(fitting)}, or " if fitting else ""
            raise ValueError(
                f"quantization='int4': {name} has {columns} columns, which are no multiple of a "
                f"group of {group_size}; use {other}quantization=int8"
            )
        if rows % CPU_ROWS and device.type == "cpu":
            raise ValueError(
                f"quantization='int4': {name} has {rows} rows, which on a CPU must be a multiple "
                f"of {CPU_ROWS}; use quantization=int8"
            )


def integer_problems(
    kind: str, dtype: str, device_type: str, precision: str | None
) -> Iterator[str]:
    """What stands against integer weights on a device.

    4-bit ones are multiplied in bfloat16: a GPU has nothing else, and on a CPU float32 takes a
    hundred times as long.

    Args:
        kind: One of `INTEGERS`.
        dtype: Of all other weights, as in a config.
        device_type: Where the products are to be computed: cpu, cuda, mps and so on.
        precision: Lightning's; None where that does not reach the model.
    """
    if problem := lacking():
        yield problem
    if kind != "int4":
        return
    if dtype not in ("auto", "bfloat16"):
        yield f"is multiplied in bfloat16, and dtype={dtype!r}; use auto, bfloat16, or int8"
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            yield f"needs a GPU of compute capability 8.0, this one has {major}.{minor}; use int8"
    elif device_type != "cpu":
        yield f"has products for cpu and cuda, and {device_type!r} is neither; use int8"
    elif precision not in (None, *CPU_PRECISIONS):
        yield (
            f"is multiplied in bfloat16, and trainer.precision={precision!r} computes in another "
            f"dtype on a CPU; use {', '.join(CPU_PRECISIONS)}, or int8"
        )


def lacking() -> str | None:
    """What has to be installed, None where nothing is missing."""
    if is_torchao_available(OLDEST):
        return None
    return f"needs torchao, version {OLDEST} or later; pip install 'llm-neo[ao]'"
