"""Which device of its own a teacher may have."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

TYPES = ("cpu", "cuda", "mps")


def device_of(name: Any) -> torch.device | None:
    """The device of that name, None where it names none that can hold weights.

    Example:
        >>> device_of("cuda:1"), device_of("meta"), device_of("gpu"), device_of(None)
        (device(type='cuda', index=1), None, None, None)
    """
    try:
        device = torch.device(name) if isinstance(name, str) else None
    except RuntimeError:
        return None
    return device if device is not None and device.type in TYPES else None


def device_problems(config: Mapping[str, Any], num_processes: int) -> Iterator[str]:
    """What stands against the device of its own that a run of several processes gives the teacher.

    Groups that are wrong by themselves are others' to report.
    """
    teacher, trainer = config["teacher"], config["trainer"]
    device = device_of(teacher.get("device"))
    if device is None or teacher.get("path") is None or not isinstance(trainer, Mapping):
        return
    where = f"teacher.device={teacher['device']!r}"
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if not any(name == str(device) or name.split(":")[0] == str(device) for name in here):
        yield f"{where}: this machine has none; it has {', '.join(here)}"
    if trainer.get("strategy") == "fsdp":
        yield (
            f"{where}: trainer.strategy=fsdp shards the teacher over the devices of all processes; "
            "use null, or another strategy"
        )
    if config.get("sharding") == "teacher":
        yield (
            f"{where}: sharding=teacher shards it over the devices of all processes; use one or "
            "the other"
        )
    if num_processes > 1 and device.type != "cpu":
        yield (
            f"{where}: would hold the teachers of all {num_processes} processes (trainer.devices x "
            "trainer.num_nodes); use cpu, null, or one process"
        )
