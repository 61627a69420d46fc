"""The teacher's head beside the hidden states that a cache keeps, once for all of them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from neo.losses.head import Head
from neo.teachers.durable import write_whole
from neo.teachers.store import CacheFolder

HEAD = "teacher_head.safetensors"


def write_head(folder: Path, head: Head) -> None:
    """Keeps a head: its weight, its bias where it has one, and what is done to its products.

    Raises:
        CacheError: There is no room.
    """
    tensors = {
        "weight": head.weight,
        "logit_scale": torch.tensor(head.logit_scale, dtype=torch.float64),
    }
    if head.bias is not None:
        tensors["bias"] = head.bias
    if head.softcap is not None:
        tensors["softcap"] = torch.tensor(head.softcap, dtype=torch.float64)
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(folder / HEAD, save(content))


def read_head(cache: CacheFolder, device: torch.device | None = None) -> Head:
    """The head that hidden states of a cache are to be given to.

    Args:
        cache: Of kind hidden.
        device: Where it is to lie; None is the CPU.

    Raises:
        CacheError: It is missing or damaged.
    """
    tensors = load_file(cache.beside(HEAD), device=str(device or "cpu"))
    softcap = tensors.get("softcap")
    return Head(
        weight=tensors["weight"],
        bias=tensors.get("bias"),
        logit_scale=float(tensors["logit_scale"]),
        softcap=None if softcap is None else float(softcap),
    )
