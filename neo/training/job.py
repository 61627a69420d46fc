"""What Hydra knows of the job that is running: its choices, its overrides, its command."""

import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from neo.results.records import command_line


def in_sweep() -> bool:
    """Whether Hydra has composed the job as one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def hydra_choices() -> tuple[dict[str, str], list[str]]:
    """Group choices and overrides as typed; empty where Hydra's main did not compose the config."""
    if not HydraConfig.initialized():
        return {}, []
    hydra_config = HydraConfig.get()
    chosen = hydra_config.runtime.choices
    choices = {k: str(v) for k, v in chosen.items() if "/" not in k and v is not None}
    return choices, [override.removeprefix("++") for override in hydra_config.overrides.task]


def command_of_job() -> list[str]:
    """The command that makes this run alone, though a sweep may have made it."""
    if in_sweep():
        searched = [o for o in HydraConfig.get().overrides.hydra if "hydra.searchpath" in o]
        return ["python", "-m", "neo.train", *hydra_choices()[1], *searched, "hydra.mode=RUN"]
    return [argument.removeprefix("++") for argument in command_line(sys.argv)]
