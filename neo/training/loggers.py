"""Where numbers go while a run trains: metrics.csv always, Weights & Biases where asked for."""

import csv
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from neo.results.metrics import METRICS
from neo.training.launch import is_first_process


def none() -> None:
    """No logger beside metrics.csv."""


def wandb(
    *,
    project: str,
    offline: bool | None = None,
    entity: str | None = None,
    tags: list[str] | None = None,
    notes: str | None = None,
    save_dir: str = ".",
    group: str | None = None,
    name: str | None = None,
    id: str | None = None,
) -> Logger:
    """Lightning's W&B logger; offline where nobody is logged in, which it says, and how to sync.

    Args:
        project: Of the dashboard.
        offline: None: if and only if nobody is logged in and WANDB_MODE says nothing.
        entity: The account or team; None is that of whoever is logged in.
        tags: Of the run.
        notes: Of the run.
        save_dir: Set by the run, as are the following.
        group: The experiment's name.
        name: The run's id, as is `id`.
        id: By which a resumed run goes on in the same place.
    """
    import wandb as library
    from lightning.pytorch.loggers import WandbLogger

    if offline is None and "WANDB_MODE" not in os.environ:
        offline = not library.login(prompt=False, verify=False)
        if offline:
            folder = Path(save_dir) / "wandb"
            print(
                "W&B: nobody is logged in, so this run is kept offline. To send it: wandb login "
                f"&& wandb sync {folder}/offline-run-*",
                file=sys.stderr,
            )
    return WandbLogger(
        project=project,
        # Lightning's `offline` sets WANDB_MODE, which wandb no longer reads once it has started,
        # and which would hold for all later jobs of a sweep.
        mode="offline" if offline else None,
        entity=entity,
        tags=tags,
        notes=notes,
        save_dir=save_dir,
        group=group,
        name=name,
        id=id,
        resume=None if offline else "allow",
    )


def finish(logger: Logger, *, ok: bool) -> None:
    """Ends a W&B run, so that the next job of a sweep begins one of its own."""
    from lightning.pytorch.loggers import WandbLogger

    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=0 if ok else 1)


def wandb_id(loggers: Iterable[Logger]) -> str | None:
    """The id by which W&B knows the run, under which a resumed one goes on; None without W&B."""
    from lightning.pytorch.loggers import WandbLogger

    return next((logger.version for logger in loggers if isinstance(logger, WandbLogger)), None)


class MetricsFile(Logger):
    """Appends every logged step to `metrics.csv`: one row a step, one column a metric.

    Unlike Lightning's CSVLogger it keeps what a run wrote before it was cut off, and drops only
    the rows past the step it goes on from.
    """

    COLUMNS = ("step", *METRICS)

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        if is_first_process():
            self._begin(resume_step)

    def _begin(self, resume_step: int | None) -> None:
        kept: list[dict[str, str]] = []
        if resume_step is not None and self.path.exists():
            with self.path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) < resume_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return "metrics.csv"

    @property
    def version(self) -> str:
        """None: one run, one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float | int], step: int | None = None) -> None:
        """Writes one row; `epoch`, which Lightning adds to everything, is left out."""
        row = {name: f"{value:.8g}" for name, value in metrics.items() if name in METRICS}
        if row:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.COLUMNS).writerow({"step": str(step), **row})
