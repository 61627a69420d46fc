"""What commands that Hydra composes have in common: how they refuse, and what they keep quiet."""

import logging
import os
import re
import sys
import warnings
from dataclasses import fields
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from neo.config import GROUPS, WHOLE, ConfigError, RunConfig, meant
from neo.training.launch import in_process_group, is_first_process, tell_launcher

# What a user's config may raise.
REFUSED = (ConfigError, HydraException, OmegaConfBaseException)
CHOICES = "teacher=none, lora=none or logger=csv"

console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_first_process())


def leave(error: Exception, status: int) -> NoReturn:
    """Exits with a message in place of a traceback."""
    tell_launcher(error)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    speaker = f"rank {rank}: " if in_process_group() else ""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        speaker + explain(error), markup=False
    )
    sys.exit(status)


def explain(error: Exception) -> str:
    """The message of a refusal; where it is Hydra's, in terms of our groups and keys."""
    text = str(error).split("\nConfig search path")[0]
    if text.startswith("Config group override must be"):
        nulls = [a for a in sys.argv[1:] if re.fullmatch(rf"({'|'.join(GROUPS)})=(null)?", a)]
        return f"{' '.join(nulls)}: a group takes the name of a file in conf/, such as {CHOICES}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return text
    if isinstance(error, MissingConfigException) and (scales := _scales(error)):
        return scales
    if found := re.search(r"Could not override '([^']*)'|Key '(\w+)' not in 'RunConfig'", text):
        key, groups = found[1] or found[2], [*GROUPS, *WHOLE]
        keys = [field.name for field in fields(RunConfig) if field.name not in groups]
        guess = meant(key, [*groups, *keys])
        return (
            f"{key}: no such group or key{guess}; the groups are {', '.join(groups)}, "
            f"the other keys {', '.join(keys)}"
        )
    return text if error.__cause__ is None else f"{text}\n{error.__cause__}"


def _scales(error: MissingConfigException) -> str:
    """What to type where an experiment has no file for the scale; empty where it is not that."""
    group, *path = (error.missing_cfg_file or "").split("/")
    if group != "experiment" or len(path) != 2 or not error.options:
        return ""
    name, scale = path
    return (
        f"experiment={name}: there is no scale={scale} of it; add "
        f"{' or '.join(f'scale={option}' for option in error.options)}"
    )


def quiet() -> None:
    """Silences what Lightning says about settings that are ours on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    # PEFT 0.21 asks transformers, and Lightning 2.6 asks torch, by a name about to go.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated")
