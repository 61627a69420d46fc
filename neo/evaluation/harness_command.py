"""The harness's own command that takes the same numbers, for whoever wants to check them."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neo.evaluation.settings import Settings


def harness_command(
    arguments: Mapping[str, Any],
    unit: str,
    settings: Settings,
    *,
    batch_size: int,
    metadata: Mapping[str, Any],
    folder: Path | None,
) -> str:
    """The command, as it can be pasted into a shell.

    Args:
        arguments: Of the model.
        unit: The task or group.
        settings: Of the evaluation.
        batch_size: That was used: the last bits of a likelihood depend on it.
        metadata: Of the tasks.
        folder: Of the unit's file, where it is not the harness's own.
    """
    words = ["lm_eval", "run", "--model", "hf", "--model_args", _pairs(arguments), "--tasks", unit]
    if folder is not None:
        words += ["--include_path", str(folder.resolve())]
    words += ["--batch_size", str(batch_size), "--device", settings.device]
    words += ["--seed", str(settings.seed)]
    if settings.num_fewshot is not None:
        words += ["--num_fewshot", str(settings.num_fewshot)]
    if settings.limit is not None:
        words += ["--limit", str(settings.limit)]
    if settings.chat:
        words += ["--apply_chat_template"]
    if given := settings.generation.given():
        words += ["--gen_kwargs", json.dumps(given)]
    if metadata:
        words += ["--metadata", json.dumps(dict(metadata))]
    return shlex.join(words)


def _pairs(arguments: Mapping[str, Any]) -> str:
    """As `key=value` pairs, or as JSON where a value would be split or read as something else."""
    texts = {key: str(value) for key, value in arguments.items()}
    if any(sign in text for text in texts.values() for sign in ",= "):
        return json.dumps(dict(arguments))
    return ",".join(f"{key}={text}" for key, text in texts.items())
