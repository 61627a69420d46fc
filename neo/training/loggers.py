"""Where numbers go beside metrics.csv: Weights & Biases, TensorBoard or MLflow, if asked for."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from neo.config import build
from neo.results.records import RunRecord
from neo.training.local_loggers import MLflowRun, TensorBoardRun
from neo.training.run_labels import RunLabels
from neo.training.wandb_run import WandbRun


def none() -> None:
    """No logger beside metrics.csv."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases; offline where nobody is logged in, which it says, and how to sync.

    Attributes:
        project: Of the dashboard.
        offline: None: if and only if nobody is logged in and WANDB_MODE says nothing.
        entity: The account or team; None is that of whoever is logged in.
        tags: Of the run, beside those of what is compared.
        notes: Of the run.
        log_adapter: Keep the trained weights there as an artifact, of type "model".
    """

    project: str
    offline: bool | None = None
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    log_adapter: bool = False

    def problems(self) -> Iterator[str]:
        """What W&B would refuse when the run begins."""
        if not self.project or len(self.project) > 128 or re.search(r"[/\\#?%:]", self.project):
            yield (
                f"logger.project={self.project!r}: must be a name of at most 128 characters "
                "without / \\ # ? % :"
            )
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                yield f"logger.tags: {tag!r} must have 1 to 64 characters"

    def build(self, labels: RunLabels) -> Logger:
        """The logger of a run; it begins with the run's config."""
        offline = self.offline
        if offline is None and "WANDB_MODE" not in os.environ:
            import wandb

            offline = not wandb.login(prompt=False, verify=False)
            if offline:
                print(
                    "W&B: nobody is logged in, so this run is kept offline. To send it: wandb "
                    f"login && wandb sync {labels.folder}/wandb/offline-run-*",
                    file=sys.stderr,
                )
        logger = WandbRun(
            labels,
            project=self.project,
            # Lightning's `offline` sets WANDB_MODE, which wandb no longer reads once it has
            # started, and which would hold for all later jobs of a sweep.
            mode="offline" if offline else None,
            entity=self.entity,
            tags=[*labels.tags, *self.tags],
            notes=self.notes,
            log_adapter=self.log_adapter,
        )
        logger.log_hyperparams(labels.hyperparameters)
        return logger


@dataclass(frozen=True, kw_only=True)
class TensorBoard:
    """TensorBoard, in the run's folder: `tensorboard --logdir runs/NAME` compares its runs."""

    def problems(self) -> Iterator[str]:
        """What is not installed."""
        yield from _missing("tensorboard", "tensorboard")

    def build(self, labels: RunLabels) -> Logger:
        """The logger of a run."""
        return TensorBoardRun(labels)


@dataclass(frozen=True, kw_only=True)
class MLflow:
    """MLflow: an experiment of the same name, in the database or at the server of the address.

    Attributes:
        tracking_uri: None: MLFLOW_TRACKING_URI where that is set, else a file under runs/.
    """

    tracking_uri: str | None = None

    @property
    def address(self) -> str:
        """Where the numbers go; MLflow 3 refuses its old default, a folder of files."""
        given = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        return given or "sqlite:///runs/mlflow.db"

    def problems(self) -> Iterator[str]:
        """What is not installed, and an address that MLflow 3 refuses."""
        yield from _missing("mlflow", "mlflow")
        if re.match(r"(file:|[^:]*$)", self.address):
            yield (
                f"logger.tracking_uri={self.address!r}: MLflow no longer keeps runs in a folder; "
                "use sqlite:///FILE.db or the address of a server"
            )
        elif not self.address.startswith(("http:", "https:", "databricks")):
            yield from _missing("mlflow", "sqlalchemy")
            yield from _missing("mlflow", "alembic")

    def build(self, labels: RunLabels) -> Logger:
        """The logger of a run; it begins with the run's config."""
        if self.address.startswith("sqlite:///"):
            Path(self.address.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        logger = MLflowRun(labels, self.address)
        logger.log_hyperparams(labels.flat())
        return logger


def logger_problems(node: Mapping[str, Any]) -> Iterator[str]:
    """What keeps the logger of a config node from beginning, found without beginning it."""
    spec = build(node)
    if spec is not None:
        yield from spec.problems()


def finish(loggers: Iterable[Logger], record: RunRecord, folder: Path) -> None:
    """Gives every logger the record's numbers, and ends it, so that the next job begins its own.

    What goes wrong there is said, and does not spoil a run that is recorded.
    """
    for logger in loggers:
        if isinstance(logger, WandbRun | TensorBoardRun | MLflowRun):
            try:
                logger.finish(record, folder)
            except Exception as error:
                kind = type(logger).__name__
                print(f"{kind}: run {record.run_id} was not ended: {error}", file=sys.stderr)


def wandb_id(loggers: Iterable[Logger]) -> str | None:
    """The id by which W&B knows the run, under which a resumed one goes on; None without W&B."""
    return next((logger.version for logger in loggers if isinstance(logger, WandbRun)), None)


def _missing(choice: str, package: str) -> Iterator[str]:
    if find_spec(package) is None:
        yield f"logger={choice}: needs {package}, not installed: pip install 'llm-neo[loggers]'"
