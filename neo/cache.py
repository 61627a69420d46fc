"""Runs a teacher once over the rows of a run and writes down what a student needs of it.

Usage: python -m neo.cache [group=choice ...] [key=value ...] [out=DIR]

The arguments are those of neo.train; sweeps are refused. `teacher.kind` says what is kept
(projected, hidden, top_k, top_p, sampled), and by default what the loss allows. Without `out` the
cache lies where runs with teacher=auto look for it. What it will take is told first; `dry_run=true`
ends there. A command that was killed goes on where it stopped when it is given again;
`rerun=true` begins anew. Exits with 2 where the config is refused, with 1 where writing failed.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from hydra_plugins._neo import SWEEPERS
from neo.config import ConfigError, conf_dir, open_groups, register, resolve
from neo.data.reader import RowFailed
from neo.teachers.durable import CacheError
from neo.training.cache_job import CacheJob
from neo.training.cache_standing import CacheIsBusy, lock_cache
from neo.training.command_line import REFUSED, console, leave, quiet
from neo.training.consistency import check_config
from neo.training.devices import num_devices
from neo.training.launch import (
    ProcessesFailed,
    end_with_launcher,
    in_process_group,
    run_processes,
    tell_launcher,
)
from neo.training.out_of_memory import OutOfMemory

# What a user's data, models or machine may raise.
FAILED = (
    ValueError,
    CacheError,
    CacheIsBusy,
    ProcessesFailed,
    MisconfigurationException,
    OutOfMemory,
    RowFailed,
)
SINGLE = "hydra.mode=RUN"


def main() -> None:
    """The command line; exits with 2 where the config is refused, with 1 where writing failed."""
    end_with_launcher()
    register()
    for sweeper in SWEEPERS:
        Plugins.instance().register(sweeper)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    typed = sys.argv[1:]

    def job(composed: DictConfig) -> None:
        try:
            if SINGLE not in typed:
                refuse_sweep()
            write_cache(composed, out)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
            sys.exit(130)
        except (*REFUSED, *FAILED) as error:
            leave(error, 2 if isinstance(error, REFUSED) else 1)

    try:
        arguments, out = split_out(typed)
        sys.argv[1:] = [*open_groups(arguments), SINGLE]
        entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
        entry(job)()
    except (*REFUSED, *FAILED) as error:  # before the job began
        leave(error, 2)
    except Exception as error:
        tell_launcher(error)
        raise


def split_out(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments of a run, and the folder of the cache where it is given.

    Raises:
        ConfigError: They ask for a sweep, or for no folder.

    Example:
        >>> split_out(["seed=1", "out=caches/mine"])
        (['seed=1'], PosixPath('caches/mine'))
    """
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError(
            ["-m: a cache is written by one command, and serves all runs of a sweep that it fits"]
        )
    kept = [a for a in arguments if not a.startswith("out=")]
    names = [a.removeprefix("out=") for a in arguments if a.startswith("out=")]
    if names and not names[-1]:
        raise ConfigError(["out=: must be a folder"])
    return kept, Path(names[-1]) if names else None


def refuse_sweep() -> None:
    """Refuses the config of a sweep, some of whose keys nobody has chosen a value for.

    Raises:
        ConfigError: It is one.
    """
    config = HydraConfig.get()
    swept = getattr(config.sweeper, "params", None)
    if swept:
        raise ConfigError(
            [
                f"experiment={config.runtime.choices.get('experiment')}: is a sweep over "
                f"{', '.join(map(str, swept))}, and a cache is of one config; add {SINGLE} to take "
                "the keys it does not sweep, and give those that the teacher's targets depend on"
            ]
        )


def write_cache(composed: DictConfig, out: Path | None = None) -> None:
    """Writes the cache of a config, from where it was left.

    Args:
        composed: By Hydra.
        out: The folder; None is where runs look for it.

    Raises:
        ConfigError: It cannot be written, or is not to be; nothing was written.
        CacheError: There was no room on the disk; what was finished is kept.
        CacheIsBusy: Another process writes it.
    """
    config = resolve(composed)
    quiet()
    check_config(config)
    job = CacheJob(config, out, console)
    num = num_devices(config["trainer"])
    if in_process_group() and not config["dry_run"]:
        job.write_share()
        return
    if job.is_finished():
        job.tidy()
        return
    if config["dry_run"]:
        job.tell()
        return
    with lock_cache(job.folder):
        if job.is_finished():  # by whoever held the lock meanwhile
            return
        job.tidy()
        if num == 1:
            job.write()
        elif HydraConfig.initialized():
            _launch(num, job.folder)
        else:
            raise ConfigError(
                [f"trainer.devices={num}: from Python, start the processes with torchrun"]
            )


def _launch(num: int, folder: Path) -> None:
    """Writes in so many processes; what stood there was removed, if it was to be."""
    overrides = HydraConfig.get().overrides
    kept = [o for o in overrides.task if not o.lstrip("+").startswith("rerun=")]
    try:
        run_processes(num, kept, overrides.hydra, module="neo.cache", own=[f"out={folder}"])
    except ProcessesFailed as failure:
        if failure.exit_code == 2:  # a refusal, of which the process has spoken
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
