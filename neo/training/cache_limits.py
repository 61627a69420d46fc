"""What a cache cannot be made with, and what to do where memory is too small for one."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from neo.config import ConfigError
from neo.teachers.online import OnlineTeacher
from neo.training.launch import LAUNCHED, in_process_group
from neo.training.out_of_memory import OutOfMemory, is_out_of_memory, shortage


def refuse_unfit(config: Mapping[str, Any]) -> None:
    """Refuses what only a run can be.

    Raises:
        ConfigError: With all reasons.
    """
    problems = []
    teacher, trainer = config["teacher"], config["trainer"]
    if not teacher.get("path"):
        problems.append("teacher.path=null: there is no teacher to run; choose one")
    elif not str(teacher.get("_target_")).endswith(f".{OnlineTeacher.__name__}"):
        problems.append(
            "teacher: reads a cache; choose the teacher that one is to be made with (teacher=mini, "
            "or teacher.path of a model)"
        )
    if trainer.get("strategy") == "fsdp":
        problems.append(
            "trainer=fsdp: processes that share a teacher cannot each write rows of their own; use "
            "trainer=ddp with a whole teacher a device (teacher.quantization=int8 or int4, or "
            "teacher.dtype=bfloat16, makes it smaller), or one device"
        )
    if config["sharding"] == "teacher":
        problems.append(
            "sharding=teacher: processes that share a teacher cannot each write rows of their own; "
            "use sharding=null with a whole teacher a device (teacher.quantization=int8 or int4, "
            "or teacher.dtype=bfloat16, makes it smaller)"
        )
    if config["rerun"] and in_process_group() and LAUNCHED not in os.environ:
        problems.append(
            "rerun=true: under torchrun or srun one process would remove what another has written; "
            "remove the folder of the cache first"
        )
    if problems:
        raise ConfigError(problems)


@contextmanager
def told_out_of_memory(config: Mapping[str, Any]) -> Iterator[None]:
    """Within it want of memory is told with what would help.

    Raises:
        OutOfMemory: A device, or the machine, had less than was asked for.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = config["data"].get("batch_size", 8)
        advice = [f"data.batch_size={max(1, size // 2)} (was {size})"] if size > 1 else []
        advice += ["a lower data.max_length"]
        if not config["teacher"].get("quantization"):
            advice.append("teacher.quantization=int8 or int4 (another teacher, so another cache)")
        said = shortage(str(error)) or (str(error).splitlines() or ["nobody knows by how much"])[0]
        raise OutOfMemory(
            f"out of memory: {said}\nWhat would help: {'; '.join(advice)}. What was finished is "
            "kept"
        ) from None
