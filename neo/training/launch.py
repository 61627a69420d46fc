"""A run of several processes, started from one: torch's elastic launcher, once, on this machine.

Lightning's own launcher repeats the command line, which under Hydra's `-m` is the whole sweep. Here
each job gets a process group of its own, that runs the job alone.
"""

import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    get_error_handler,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# Set in the processes of `run_processes`, for which another has spoken already.
LAUNCHED = "NEO_LAUNCHED"
# Sent on to the processes, which save a checkpoint and leave.
SENT_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# How long processes that wait for a dead one are given to end by themselves.
SHUTDOWN_S = 15
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class ProcessesFailed(RuntimeError):
    """One of the processes of a run ended before its time, and the others with it."""

    def __init__(self, rank: int, failure: ProcessFailure) -> None:
        self.rank, self.exit_code = rank, failure.exitcode
        super().__init__(f"rank {rank}: {_reason(failure)}")


def in_process_group() -> bool:
    """Whether this process is one of several that torchrun or SLURM has started for a run."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    tasks = os.environ.get("SLURM_NTASKS", "1")
    return "SLURM_PROCID" in os.environ and tasks.isdigit() and int(tasks) > 1


def is_first_process() -> bool:
    """Whether this is the process that speaks and writes for all of a run."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return not in_process_group() or rank == "0"


def place_in_group() -> tuple[int, int]:
    """This process's rank among those that were started together, and how many they are."""
    if not in_process_group():
        return 0, 1
    by_torch = "TORCHELASTIC_RUN_ID" in os.environ
    names = ("RANK", "WORLD_SIZE") if by_torch else ("SLURM_PROCID", "SLURM_NTASKS")
    return int(os.environ[names[0]]), int(os.environ[names[1]])


def tell_launcher(error: BaseException) -> None:
    """Leaves word of why this process ends, for whoever started it and the others."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def end_with_launcher() -> None:
    """Has this process told to stop, by SIGTERM, should the one that started it be killed.

    Otherwise those of a killed launcher would train on, unseen. Linux alone can do that.
    """
    if LAUNCHED in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_processes(
    num_processes: int,
    overrides: Sequence[str],
    hydra_overrides: Sequence[str] = (),
    *,
    module: str = "neo.train",
    own: Sequence[str] = (),
) -> None:
    """Runs one job in so many processes of this machine and waits for them.

    Args:
        num_processes: One per device.
        overrides: The job's, as Hydra took them.
        hydra_overrides: Those of Hydra itself.
        module: The command.
        own: Its arguments that Hydra does not know.

    Raises:
        ProcessesFailed: The first process that failed, by its own account or by how it ended.
    """
    # where configs lie is said to Hydra; the rest of what it is told is of the sweep
    searched = [a for a in hydra_overrides if a.startswith("hydra.searchpath")]
    arguments = [*overrides, *searched, "hydra.mode=RUN", *own]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    values = {LAUNCHED: "1"}
    if "OMP_NUM_THREADS" not in os.environ:  # as torchrun does, so that they leave each other cores
        values["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as accounts, _environment(values), _signals_sent_on():
        config = _launch_config(num_processes, accounts)
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            raise ProcessesFailed(*_first(error.failures)) from None


def _launch_config(num_processes: int, accounts: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        # the others are ours to send on; a process that a dead one left waiting is killed
        signals_to_handle="SIGHUP",
        shutdown_timeout=SHUTDOWN_S,
        logs_specs=DefaultLogsSpecs(log_dir=accounts),  # where a process says why it failed
    )


def _first(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The failure that brought the others about: a process killed, else the earliest."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, int]:
        code = item[1].exitcode
        # one that was killed tells no time; SIGTERM is how the launcher ends those that are left
        return 2 if code == -signal.SIGTERM else int(code >= 0), item[1].timestamp

    return min(failures.items(), key=order)


def _reason(failure: ProcessFailure) -> str:
    message = failure.message
    if isinstance(message, Mapping):
        message = message.get("message", "")
    text = str(message).strip().splitlines()
    said = failure.exitcode >= 0 and text and failure.error_file != "<N/A>"
    return text[0] if said else ended_with(failure.exitcode)


def ended_with(exit_code: int) -> str:
    """How a process ended that says no more of itself.

    Example:
        >>> ended_with(3), ended_with(-15)
        ('exit status 3', 'killed by SIGTERM')
    """
    if exit_code >= 0:
        return f"exit status {exit_code}"
    number = -exit_code
    name = signal.Signals(number).name if number in list(signal.Signals) else str(number)
    memory = "; often by the system, for want of memory" if number == signal.SIGKILL else ""
    return f"killed by {name}{memory}"


@contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None, None, None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _signals_sent_on() -> Generator[None, None, None]:
    """Within it children are told what this process is told by signal; they hear an interrupt."""

    def send_on(number: int, _: Any) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)

    handlers: dict[signal.Signals, Callable[[int, Any], None]] = dict.fromkeys(SENT_ON, send_on)
    handlers[signal.SIGINT] = lambda number, frame: None
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
