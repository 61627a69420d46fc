"""How many devices, and so processes, a run has: from its config, be the devices here or not."""

from collections.abc import Mapping
from typing import Any

import torch


def on_gpu(trainer: Mapping[str, Any]) -> bool:
    """Whether the config's trainer runs on GPUs."""
    accelerator = trainer.get("accelerator", "auto")
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def num_devices(trainer: Mapping[str, Any]) -> int:
    """How many devices of a node Lightning takes.

    Example:
        >>> [num_devices({"devices": d, "accelerator": "cpu"}) for d in (2, "3", [0, 2], "auto")]
        [2, 3, 2, 1]
    """
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list | tuple):
        return len(devices)
    if isinstance(devices, str) and "," in devices:  # "0,1" are those, "2" is how many
        return len([d for d in devices.split(",") if d.strip()])
    if devices in ("auto", -1, "-1", None):
        return max(1, torch.cuda.device_count()) if on_gpu(trainer) else 1
    return int(devices)


def num_processes(trainer: Mapping[str, Any]) -> int:
    """How many processes train a run together: one for each device of each node."""
    return num_devices(trainer) * int(trainer.get("num_nodes", 1) or 1)
