"""The main job: compose, validate, skip if recorded, build, fit, record.

Usage: python -m neo.train [group=choice ...] [key=value ...]; `--help` explains.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.core.plugins import Plugins
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from hydra_plugins._neo import SWEEPERS
from neo.config import (
    ConfigError,
    conf_dir,
    open_groups,
    register,
    resolve,
    run_id,
)
from neo.results.records import RunRecord
from neo.training.apart import Outcome, run_apart
from neo.training.command_line import REFUSED, console, leave, quiet
from neo.training.consistency import check_config
from neo.training.devices import num_devices
from neo.training.ending import OutputError
from neo.training.job import in_sweep
from neo.training.launch import (
    LAUNCHED,
    ProcessesFailed,
    end_with_launcher,
    in_process_group,
    is_first_process,
    tell_launcher,
)
from neo.training.meet import build_specs, meet_all
from neo.training.out_of_memory import OutOfMemory
from neo.training.preflight import planned_or_refused
from neo.training.run import Run
from neo.training.run_cache import find_teaching
from neo.training.run_folder import PATIENCE_S, RunIsBusy, folder_of, lock_run, recorded_run
from neo.training.skipped_steps import DivergedError
from neo.training.summary import print_plan
from neo.training.sweep import SweepFailed

# What a user's data, models or machine may raise.
FAILED = (
    ValueError,
    DivergedError,
    ProcessesFailed,
    MisconfigurationException,
    OutOfMemory,
    OutputError,
    RunIsBusy,
)


def main() -> None:
    """The command line; exits with 2 where the config is refused, with 1 where a run failed."""
    end_with_launcher()
    register()
    for sweeper in SWEEPERS:
        Plugins.instance().register(sweeper)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    sys.argv[1:] = open_groups(sys.argv[1:])
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    try:
        entry(_job)()
    except SweepFailed as error:
        leave(error, 1)
    except (*REFUSED, *FAILED) as error:  # before the job began
        leave(error, 2)
    except Exception as error:
        if str(error).startswith(("Unknown plugin class", "Invalid plugin")):  # Hydra's
            leave(error, 2)
        tell_launcher(error)
        raise


def _job(composed: DictConfig) -> Outcome | None:
    if in_sweep() and not composed["dry_run"]:
        return run_apart(train, composed)
    try:
        train(composed)
    except (*REFUSED, *FAILED) as error:
        leave(error, 2 if isinstance(error, REFUSED) else 1)
    return None


def compose(*overrides: str) -> DictConfig:
    """The config of a command line, for `train`: what it is typed with, from Python.

    Example:
        >>> compose("method=kd", "seed=3").seed
        3
    """
    register()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose("config", open_groups(list(overrides)))


def train(composed: DictConfig, *, wait_s: float = PATIENCE_S) -> RunRecord | None:
    """One run, from its composed config to its record; None for a dry run.

    Args:
        composed: By Hydra.
        wait_s: For another process that trains this very run.

    Raises:
        ConfigError: The config cannot run; nothing was loaded or written.
        RunIsBusy: Another process trains it for longer than that.
    """
    config = resolve(composed)
    quiet()
    check_config(config)
    identity = run_id(config)
    folder = folder_of(config, identity)
    if (recorded := _recorded(config, folder, identity)) is not None:
        return recorded
    L.seed_everything(config["seed"], workers=True, verbose=False)
    specs = build_specs(config)
    meeting, data = meet_all(config, specs)
    specs = find_teaching(config, specs, meeting.vocab, data)
    if LAUNCHED not in os.environ:
        plan = planned_or_refused(config, specs, meeting.vocab, data)
        print_plan(console, config, specs, folder, meeting, data, plan)
    if config["dry_run"]:
        return None
    trainer = config["trainer"]
    if trainer.get("num_nodes", 1) > 1 and not in_process_group():
        raise ConfigError(
            [
                f"trainer.num_nodes={trainer['num_nodes']}: start the command on every node, with "
                "torchrun or srun; README, Many devices"
            ]
        )
    # who launched this process holds the lock for it
    alone = LAUNCHED not in os.environ and is_first_process()
    with lock_run(folder, wait_s) if alone else nullcontext():
        run = Run(config, identity, folder, specs, meeting, data, console)
        if in_process_group():
            return run.record()
        if (recorded := _recorded(config, folder, identity)) is not None:
            return recorded  # by a process that held the lock meanwhile
        num = num_devices(trainer)
        return run.record() if num == 1 else run.launch(num)


def _recorded(config: dict[str, Any], folder: Path, identity: str) -> RunRecord | None:
    """The record of a run that came to its end and is not to be run again; failed ones are."""
    recorded = recorded_run(folder, identity)
    if recorded is None or recorded.status not in ("ok", "pruned"):
        return None
    if config["rerun"] or config["dry_run"]:
        return None
    console.print(f"run {identity} is recorded in {folder}; rerun=true trains it again")
    return recorded


if __name__ == "__main__":
    # under its own name, by which other processes of a sweep find what they are to run
    from neo.train import main as command

    command()
