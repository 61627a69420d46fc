"""Lightning's Trainer as a run needs it: which of its keys are the user's, and what they may be."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger

from neo.config import OWN_KEYS
from neo.training.devices import num_processes
from neo.training.strategies import STRATEGIES, build_strategy

# What the callbacks, the data and the record rely on, so that a config may not set it.
OURS: dict[str, Any] = {
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
}
BUILT_BY_US = ("callbacks", "logger", "default_root_dir")
LEAST = {"accumulate_grad_batches": 1, "val_check_interval": 1, "log_every_n_steps": 1}
NEEDED = (*LEAST, "max_steps", "max_epochs", "enable_progress_bar")


def build_trainer(
    node: Mapping[str, Any],
    callbacks: Sequence[L.Callback],
    loggers: Sequence[Logger],
    *,
    sharding: str | None = None,
) -> L.Trainer:
    """The Trainer of a config node; our own progress bar takes the place of Lightning's."""
    keys = {
        key: value
        for key, value in node.items()
        if key != "_target_" and f"trainer.{key}" not in OWN_KEYS
    }
    strategy = node.get("strategy", "auto")
    keys["strategy"] = build_strategy(strategy, num_processes(node), sharding)
    return L.Trainer(
        **keys | {"enable_progress_bar": False} | OURS,
        callbacks=list(callbacks),
        logger=list(loggers),
    )


def trainer_problems(node: Mapping[str, Any], *, here: bool = True) -> list[str]:
    """What is wrong with the node, found by building a Trainer that is thrown away.

    Args:
        node: The trainer's.
        here: The run is for this machine; else only its values are looked at, and no Trainer is
            built, which asks for the devices.
    """
    problems = list(_range_problems(node))
    if problems or not here:
        return problems
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the run's own Trainer is built
            trainer = build_trainer(node, [], [])
    # Lightning raises all of these, and RuntimeError where a device is missing.
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        shown = ", ".join(f"{key}={node[key]}" for key in ("accelerator", "devices") if key in node)
        return [f"trainer ({shown}): {' '.join(str(error).split())}"]
    if node.get("precision") in ("16-mixed", "16", 16) and trainer.precision == "bf16-mixed":
        return [
            f"trainer.precision={node['precision']!r}: a CPU has none; use 32-true or bf16-mixed"
        ]
    return []


def _range_problems(node: Mapping[str, Any]) -> Iterator[str]:
    for key in (*OURS, *BUILT_BY_US):
        if key in node:
            yield f"trainer.{key}: is set by the run itself; leave it out"
    if missing := [key for key in NEEDED if key not in node]:
        yield from (f"trainer.{key}: missing; see conf/trainer/auto.yaml" for key in missing)
        return
    if (strategy := node.get("strategy", "auto")) not in STRATEGIES:
        yield f"trainer.strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}"
    if str(node.get("precision")) in ("16-true", "bf16-true", "transformer-engine"):
        yield (
            f"trainer.precision={node['precision']!r}: what trains is float32 here; use bf16-mixed "
            "with student.dtype=bfloat16, or 32-true"
        )
    for key, least in LEAST.items():
        if not isinstance(node[key], int) or node[key] < least:
            yield f"trainer.{key}={node[key]!r}: must be an integer of at least {least}"
    clip = node.get("gradient_clip_val")
    if clip is not None and not (isinstance(clip, int | float) and clip >= 0):
        yield f"trainer.gradient_clip_val={clip!r}: must be at least 0, or null for none"
    memory = node.get("device_memory_gib")
    if memory is not None and not (isinstance(memory, int | float) and 0 < memory < math.inf):
        yield f"trainer.device_memory_gib={memory!r}: must be above 0, or null for what there is"
    steps, epochs = node["max_steps"], node["max_epochs"]
    if steps != -1 and (not isinstance(steps, int) or steps < 1):
        yield f"trainer.max_steps={steps!r}: must be at least 1, or -1 for no limit"
    if epochs not in (None, -1) and (not isinstance(epochs, int) or epochs < 1):
        yield f"trainer.max_epochs={epochs!r}: must be at least 1, or -1 for no limit"
    if steps == -1 and epochs in (None, -1):
        yield "trainer.max_steps=-1 and trainer.max_epochs=-1: one of them must end the run"
