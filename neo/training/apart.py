"""A job of a sweep, in a process of its own: what kills the job does not reach the sweep.

The process is forked from a small server that has imported neo and done nothing else, so that it
begins at once and holds nothing of the jobs before it: no memory, no CUDA context, no random state.
"""

import copy
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from neo.config import register, resolve, run_id
from neo.results.records import RunRecord, provenance, write_record
from neo.training.command_line import console, explain, leave
from neo.training.device_locks import devices_of_its_own
from neo.training.job import command_of_job, hydra_choices
from neo.training.launch import SENT_ON, ended_with
from neo.training.run_folder import RunIsBusy, folder_of, lock_run, recorded_run

# Processes that multiprocessing starts look at the main module, which is one of ours.
warnings.filterwarnings("ignore", "'neo.train' found in sys.modules", RuntimeWarning)

BUSY = "busy"  # another process trains this run
FAILED = ("failed", "oom", "diverged")
# A run with such a record is not run again by a sweep, unless that is asked for.
DONE = ("ok", "pruned", *FAILED)

Train = Callable[..., RunRecord | None]


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Args:
        status: Of its record, or `BUSY`.
        error: What stopped it.
    """

    status: str
    error: str | None = None


def run_apart(train: Train, composed: DictConfig) -> Outcome:
    """What became of a job that was run in a process of its own; its record says it, too.

    A process that ends without a record (killed, crashed, refused) is recorded here. A signal that
    asks this process to stop is sent on to the job, and obeyed when the job has ended.

    Args:
        train: Trains the composed config.
        composed: Of the job, in which Hydra has set up this process.
    """
    config = resolve(composed)
    identity = run_id(config)
    folder = folder_of(config, identity)
    try:
        with devices_of_its_own(config, console.print) as devices:
            before = recorded_run(folder, identity)  # not before it has waited for devices
            if before is not None and before.status in DONE and not config["rerun"]:
                return Outcome(before.status, before.error)  # another sweep was here
            word, exit_code = _run(train, composed, os.environ | devices)
    except ValueError as error:  # there are fewer devices
        before = recorded_run(folder, identity)
        word, exit_code = Outcome("failed", str(error)), 1
    if word is not None and word.status == BUSY:
        return word
    record = recorded_run(folder, identity)
    if record is not None and record != before:
        return Outcome(record.status, record.error)
    stopped = -exit_code in SENT_ON
    ended = word or Outcome("interrupted" if stopped else "failed", ended_with(exit_code))
    if record is not None and record.status in ("ok", "pruned"):
        return ended  # it was to be run once more and was not; what it has stands
    return ended if _recorded(config, folder, before, ended) else Outcome(BUSY)


def _run(
    train: Train, composed: DictConfig, environ: Mapping[str, str]
) -> tuple[Outcome | None, int]:
    """What the job's process said at its end, if anything, and its exit code."""
    hears, tells = multiprocessing.Pipe(duplex=False)
    arguments = (train, composed, _hydra_of_job(), environ, tells)
    process = _server().Process(target=_run_here, args=arguments)  # type: ignore[attr-defined]
    with _signals_sent_on(process) as received:
        process.start()
        for number in received:  # while it could not hear them yet
            os.kill(process.pid or 0, number)
        tells.close()
        word = _last_word(process, hears)
    return word, process.exitcode or 0


def _hydra_of_job() -> Any:
    """What Hydra has set up for the job, but for what sweeps it, whose classes plugins redefine."""
    whole: Any = copy.deepcopy(HydraConfig.instance().cfg)
    OmegaConf.set_readonly(whole.hydra, False)
    whole.hydra.launcher = whole.hydra.sweeper = None
    return whole


def _recorded(
    config: dict[str, Any], folder: Path, before: RunRecord | None, ended: Outcome
) -> bool:
    """Writes the record of a run that could not; whether no other process runs it meanwhile."""
    choices, overrides = hydra_choices()
    record = RunRecord(
        run_id=run_id(config),
        experiment_name=config["experiment_name"],
        status=ended.status,
        error=ended.error,
        choices=choices,
        overrides=overrides,
        config=config,
        seed=config["seed"],
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        argv=command_of_job(),
        **provenance(),
    )
    try:
        with lock_run(folder):
            if recorded_run(folder, record.run_id) == before:
                write_record(record, folder)
    except RunIsBusy:
        return False
    return True


def start_server() -> None:
    """Has the server import neo while this process does something else."""
    context = _server()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


def _server() -> multiprocessing.context.BaseContext:
    """Forks from a clean process where the system can, starts anew where it cannot."""
    methods = multiprocessing.get_all_start_methods()
    if multiprocessing.get_start_method() not in methods:
        # joblib's workers have one of their own, which their children would look for in vain
        multiprocessing.set_start_method(methods[0], force=True)
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["neo.training.unsignalled", "neo.train"])
    return context


def _run_here(
    train: Train, composed: DictConfig, hydra: Any, environ: Mapping[str, str], tells: Connection
) -> None:
    """The job's process."""
    for number in SENT_ON:
        signal.signal(number, signal.SIG_DFL)  # which the server does not hear
    os.environ.clear()  # the server began with those of another time
    os.environ.update(environ)
    _end_with_parent()
    register()
    setup_globals()
    HydraConfig.instance().set_config(hydra)
    try:
        train(composed, wait_s=0.0)
    except RunIsBusy:
        tells.send(Outcome(BUSY))
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {explain(error)}".split())
        tells.send(Outcome(getattr(error, "status", "failed"), said))
        leave(error, 1)


def _end_with_parent() -> None:
    """Has this process asked to stop, by SIGTERM, when the one that waits for it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _last_word(process: BaseProcess, hears: Connection) -> Outcome | None:
    """What the process says of its end, if it does, once it has ended."""
    word = None
    if hears in wait([hears, process.sentinel]):
        with suppress(EOFError):  # it ends without a word
            word = hears.recv()
    process.join()
    return word


@contextmanager
def _signals_sent_on(process: BaseProcess) -> Generator[list[int], None, None]:
    """Within it the process hears what this one is told, which then does it itself at the end."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        if number != signal.SIGINT and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)  # an interrupt of the terminal reaches all by itself

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (*SENT_ON, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        os.kill(os.getpid(), received[0])
