"""The main job: compose, validate, skip if recorded, build, fit, record.

Usage: python -m neo.train [group=choice ...] [key=value ...]; `--help` explains.
"""

import logging
import os
import re
import sys
import traceback
import warnings
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from neo.config import (
    GROUPS,
    SPECS,
    ConfigError,
    RunConfig,
    build,
    conf_dir,
    meant,
    open_groups,
    register,
    resolve,
    run_id,
)
from neo.results.records import RunRecord
from neo.training.consistency import check_config
from neo.training.ending import OutputError
from neo.training.launch import (
    LAUNCHED,
    ProcessesFailed,
    in_process_group,
    is_first_process,
    tell_launcher,
)
from neo.training.meet import meet_all
from neo.training.out_of_memory import OutOfMemory
from neo.training.run import Run
from neo.training.run_folder import recorded_run
from neo.training.skipped_steps import DivergedError
from neo.training.summary import print_plan
from neo.training.trainer import num_processes

# What a user's config, and what a user's data, models or machine may raise.
REFUSED = (ConfigError, HydraException, OmegaConfBaseException)
FAILED = (
    ValueError,
    DivergedError,
    ProcessesFailed,
    MisconfigurationException,
    OutOfMemory,
    OutputError,
)
CHOICES = "teacher=none, lora=none or logger=csv"

console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_first_process())


def main() -> None:
    """The command line; exits with 2 where the config is refused, with 1 where a run failed."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    sys.argv[1:] = open_groups(sys.argv[1:])
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    try:
        entry(_job)()
    except REFUSED as error:  # before the job began, or by a job of a sweep
        _leave(error, 2)
    except FAILED as error:
        _leave(error, 1 if HydraConfig.initialized() else 2)
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
        _leave(error, 2 if isinstance(error, REFUSED) else 1)


def _leave(error: Exception, status: int) -> NoReturn:
    """Exits with a message in place of a traceback."""
    tell_launcher(error)
    speaker = f"rank {os.environ.get('RANK')}: " if in_process_group() else ""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        speaker + _explain(error), markup=False
    )
    sys.exit(status)


def _explain(error: Exception) -> str:
    """The message of a refusal; where it is Hydra's, in terms of our groups and keys."""
    text = str(error).split("\nConfig search path")[0]
    if text.startswith("Config group override must be"):
        nulls = [a for a in sys.argv[1:] if re.fullmatch(rf"({'|'.join(GROUPS)})=(null)?", a)]
        return f"{' '.join(nulls)}: a group takes the name of a file in conf/, such as {CHOICES}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return text
    if found := re.search(r"Could not override '([^']*)'|Key '(\w+)' not in 'RunConfig'", text):
        key, groups = found[1] or found[2], [*GROUPS, "experiment"]
        keys = [field.name for field in fields(RunConfig) if field.name not in groups]
        guess = meant(key, [*groups, *keys])
        return (
            f"{key}: no such group or key{guess}; the groups are {', '.join(groups)}, "
            f"the other keys {', '.join(keys)}"
        )
    return text if error.__cause__ is None else f"{text}\n{error.__cause__}"


def train(composed: DictConfig) -> RunRecord | None:
    """One run, from its composed config to its record; None for a dry run.

    Raises:
        ConfigError: The config cannot run; nothing was loaded or written.
    """
    config = resolve(composed)
    _quiet()
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
        print_plan(console, config, specs, folder, meeting, data)
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
    num = num_processes(trainer)
    return run.record() if num == 1 else run.launch(num)


def _quiet() -> None:
    """Silences what Lightning says about settings that are ours on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    # PEFT 0.21 asks transformers, and Lightning 2.6 asks torch, by a name about to go.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated")


if __name__ == "__main__":
    main()
