"""GPUs handed out to the jobs of sweeps on one machine, so that no two jobs share one unasked."""

import os
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from neo.training.devices import num_devices, on_gpu

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_S = 1.0


@contextmanager
def devices_of_its_own(
    config: Mapping[str, Any], say: Callable[[str], None]
) -> Generator[dict[str, str], None, None]:
    """Within it as many GPUs as the run asks for are its own; gives the environment that says so.

    Nothing is handed out on a CPU, and to a run that names its devices (`trainer.devices=[0]`).
    """
    trainer = config["trainer"]
    names = visible_devices() if on_gpu(trainer) else []
    asked = trainer.get("devices", "auto")
    named = isinstance(asked, list | tuple) or (isinstance(asked, str) and "," in asked)
    if not names or named:
        yield {}
        return
    num = max(num_devices(trainer), 1 + _teacher_index(config))
    folder = Path(tempfile.gettempdir()) / f"neo-devices-{os.getuid()}"
    with hand_out(names, num, folder, say) as own:
        yield {VISIBLE: ",".join(own)}


def visible_devices() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES calls them."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def hand_out(
    names: Sequence[str], num: int, folder: Path, say: Callable[[str], None]
) -> Generator[list[str], None, None]:
    """Within it so many of the devices are held by this process; waits until they are free.

    Args:
        names: Of the devices there are.
        num: To hold, all of them at once or none.
        folder: Of the locks, one for all processes of this machine.
        say: Told once that it waits.

    Raises:
        ValueError: There are fewer devices than that.
    """
    if num > len(names):
        raise ValueError(f"trainer.devices: {num} GPUs are asked for, and there are {len(names)}")
    folder.mkdir(parents=True, exist_ok=True)
    waits = False
    while True:
        with ExitStack() as held:
            own: list[str] = []
            for name in names:
                lock = FileLock(folder / f"{name.replace('/', '_')}.lock", blocking=False)
                try:
                    held.enter_context(lock)
                except Timeout:
                    continue
                own.append(name)
                if len(own) == num:
                    yield own
                    return
        if not waits:
            say(f"waits for {num} free GPU{'s' * (num > 1)} of {', '.join(names)}")
            waits = True
        time.sleep(POLL_S)


def _teacher_index(config: Mapping[str, Any]) -> int:
    """The number of the teacher's own GPU; -1 where it has none."""
    device = str(config["teacher"].get("device") or "")
    return int(device.removeprefix("cuda:")) if device.startswith("cuda:") else -1
