"""The main job: compose, validate, skip if recorded, build, fit, record.

Usage: python -m neo.train [group=choice ...] [key=value ...]; `--help` explains.
"""

import os
import sys
import traceback
from pathlib import Path

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from neo.config import (
    SPECS,
    ConfigError,
    build,
    conf_dir,
    open_groups,
    register,
    resolve,
    run_id,
)
from neo.results.records import RunRecord
from neo.training.command_line import REFUSED, console, leave, quiet
from neo.training.consistency import check_config
from neo.training.devices import num_devices
from neo.training.ending import OutputError
from neo.training.launch import (
    LAUNCHED,
    ProcessesFailed,
    end_with_launcher,
    in_process_group,
    tell_launcher,
)
from neo.training.meet import meet_all
from neo.training.out_of_memory import OutOfMemory
from neo.training.preflight import planned_or_refused
from neo.training.run import Run
from neo.training.run_folder import recorded_run
from neo.training.skipped_steps import DivergedError
from neo.training.summary import print_plan

# What a user's data, models or machine may raise.
FAILED = (
    ValueError,
    DivergedError,
    ProcessesFailed,
    MisconfigurationException,
    OutOfMemory,
    OutputError,
)


def main() -> None:
    """The command line; exits with 2 where the config is refused, with 1 where a run failed."""
    end_with_launcher()
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    sys.argv[1:] = open_groups(sys.argv[1:])
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    try:
        entry(_job)()
    except REFUSED as error:  # before the job began, or by a job of a sweep
        leave(error, 2)
    except FAILED as error:
        leave(error, 1 if HydraConfig.initialized() else 2)
    except Exception as error:
        tell_launcher(error)
        raise


def _job(composed: DictConfig) -> None:
    try:
        train(composed)
    except (*REFUSED, *FAILED) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            traceback.clear_frames(error.__traceback__)  # which hold the models of this job
            raise  # the other jobs of the sweep go on, and Hydra raises it at the end
        leave(error, 2 if isinstance(error, REFUSED) else 1)


def train(composed: DictConfig) -> RunRecord | None:
    """One run, from its composed config to its record; None for a dry run.

    Raises:
        ConfigError: The config cannot run; nothing was loaded or written.
    """
    config = resolve(composed)
    quiet()
    check_config(config)
    identity = run_id(config)
    folder = Path(config["run_dir"] or f"runs/{config['experiment_name']}/{identity}")
    recorded = recorded_run(folder, identity)
    if recorded is not None and not config["rerun"] and not config["dry_run"]:
        console.print(f"run {identity} is recorded in {folder}; rerun=true trains it again")
        return recorded
    L.seed_everything(config["seed"], workers=True, verbose=False)
    specs = {key: build(config[key]) for key in SPECS}
    if specs["teacher"].path is None:
        specs["teacher"] = None
    meeting, data = meet_all(config, specs)
    if LAUNCHED not in os.environ:
        plan = planned_or_refused(config, specs, meeting.vocab, data)
        print_plan(console, config, specs, folder, meeting, data, plan)
    if config["dry_run"]:
        return None
    run = Run(config, identity, folder, specs, meeting, data, console)
    if in_process_group():
        return run.record()
    trainer = config["trainer"]
    if trainer.get("num_nodes", 1) > 1:
        raise ConfigError(
            [
                f"trainer.num_nodes={trainer['num_nodes']}: start the command on every node, with "
                "torchrun or srun; README, Many devices"
            ]
        )
    num = num_devices(trainer)
    return run.record() if num == 1 else run.launch(num)


if __name__ == "__main__":
    main()
