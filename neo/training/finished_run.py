"""A run that has come to its end, opened again: its config, its models and its rows."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import PreTrainedModel

from neo.config import ConfigError, build, validate
from neo.data.prompt import PromptEncoder
from neo.losses.distillation import Distillation
from neo.models.causal_lm import CausalLM
from neo.models.student import inner
from neo.models.trained import load_trained
from neo.teachers.cached import CachedTeacher
from neo.teachers.online import OnlineTeacher

CPU = torch.device("cpu")


@dataclass(frozen=True)
class FinishedRun:
    """What a run was, of its folder; a model is read when it is asked for.

    Args:
        folder: Of the run.
        config: Of the run, validated.
    """

    folder: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "FinishedRun":
        """The run of a folder.

        Raises:
            ValueError: It is not the folder of a run that has finished.
        """
        return cls(folder, run_config(folder))

    @cached_property
    def data(self) -> Any:
        """What its rows are: `rows()`, and of the mini-lab `right_rows()` too."""
        return build(self.config["data"])

    @cached_property
    def loss(self) -> Distillation:
        """What it was trained by."""
        return build(self.config["loss"])

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Makes examples of conversations as the run did, with the student's tokenizer."""
        tokenizer = self._student.tokenizer()
        return PromptEncoder(tokenizer, self.data.max_length, self.data.chat_template)

    def base(self, device: torch.device = CPU) -> PreTrainedModel:
        """The student before the run."""
        seed = self.config["seed"]
        model: Any = self._student.load(device, trained=False, seed=seed)
        return model if self._student.quantization else model.to(device)

    def student(self, device: torch.device = CPU) -> PreTrainedModel:
        """The student after the run, with what was trained."""
        return inner(load_trained(self._student, self.folder, device, seed=self.config["seed"]))

    def teacher(self, device: torch.device = CPU) -> PreTrainedModel:
        """The teacher of the run.

        Raises:
            ValueError: It had none.
        """
        spec: OnlineTeacher | CachedTeacher = build(self.config["teacher"])
        if isinstance(spec, CachedTeacher):
            spec = spec.teacher()
        if spec.path is None:
            raise ValueError(f"run={self.folder}: had no teacher (teacher.path=null)")
        return spec.load_frozen(device).to(device).model

    @cached_property
    def _student(self) -> CausalLM:
        return build(self.config["student"])


def run_config(run: Path) -> dict[str, Any]:
    """The config of a run, checked as any other: it names code that will be called.

    Raises:
        ValueError: The folder is not that of a run that has finished.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"run={run}: holds no config.yaml, it is not the folder of a run")
    if not (run / "adapter").is_dir() and not (run / "model").is_dir():
        raise ValueError(f"run={run}: holds neither adapter/ nor model/; did the run finish?")
    config = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(config, dict) or "student" not in config:
        raise ConfigError([f"{file}: has no student"])
    validate(config)  # type: ignore[arg-type]
    return config  # type: ignore[return-value]
