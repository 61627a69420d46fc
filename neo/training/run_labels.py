"""What a dashboard calls a run: its group, name, tags, and the id under which it goes on."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The groups that are compared; student, teacher and all else are found through the config.
TAGGED = ("lora", "loss", "data")


@dataclass(frozen=True, kw_only=True)
class RunLabels:
    """What a logger is told of a run.

    Attributes:
        config: Resolved.
        run_id: Of the config; two experiments may hold the same one.
        choices: Config group to chosen file; empty where the config was composed from Python.
        folder: Of the run.
        resume_step: The optimizer step it goes on from; None for one that begins.
        kept_id: What W&B called it when the checkpoint was written.
    """

    config: Mapping[str, Any]
    run_id: str
    choices: Mapping[str, str]
    folder: Path
    resume_step: int | None = None
    kept_id: str | None = None

    @property
    def resumed(self) -> bool:
        """Whether it goes on from a checkpoint."""
        return self.resume_step is not None

    @property
    def experiment(self) -> str:
        """The experiment's name: the group of its runs."""
        return str(self.config["experiment_name"])

    @property
    def method(self) -> str:
        """One of sft, lora, kd, neo: the kind of job."""
        return str(self.config["method"]["name"])

    @property
    def name(self) -> str:
        """A name to read, such as "neo dora seed 0 8ea2e51d"."""
        variant = self.choices.get("lora", "none")
        words = [self.method, *([] if variant == "none" else [variant])]
        return " ".join([*words, "seed", str(self.config["seed"]), self.run_id])

    @property
    def tags(self) -> list[str]:
        """What is compared, such as "lora=dora"."""
        # W&B refuses longer ones
        return [f"{key}={self.choices[key]}"[:64] for key in TAGGED if key in self.choices]

    @property
    def id(self) -> str:
        """Unlike `run_id`, unique in a project that holds several experiments.

        A run that goes on keeps the one it had, whatever the experiment is called by now.
        """
        return self.kept_id or f"{_slug(self.experiment)}-{self.run_id}"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The config and the choices that made it."""
        return {**self.config, "choices": dict(self.choices)}

    def flat(self) -> dict[str, Any]:
        """The hyperparameters by the names one types, such as "lora.r"."""
        return dict(_flat(self.hyperparameters))


def _slug(name: str) -> str:
    """The name where it may stand in an id, else the legal part of it with a digest."""
    if re.fullmatch(r"[\w.-]{1,48}", name, re.ASCII):
        return name
    legal = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:41]
    return f"{legal}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
