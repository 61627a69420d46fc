"""metrics.csv: what a run logs, in a file of its own, whatever other logger it has."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from neo.results.metrics import METRICS
from neo.training.launch import is_first_process


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
