"""A run in Weights & Biases: its labels, how each number is summed up, and how it ends."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from neo.results.dashboard import BEST, STEP
from neo.results.records import RunRecord
from neo.results.summary import numbers_of
from neo.training.run_labels import RunLabels


class WandbRun(WandbLogger):
    """Lightning's W&B logger, with the labels of a run and the numbers of its record."""

    def __init__(
        self,
        labels: RunLabels,
        *,
        project: str,
        mode: str | None,
        entity: str | None,
        tags: list[str],
        notes: str | None,
        log_adapter: bool,
    ) -> None:
        super().__init__(
            project=project,
            mode=mode,
            entity=entity,
            tags=tags,
            notes=notes,
            save_dir=str(labels.folder),
            group=labels.experiment,
            job_type=labels.method,
            name=labels.name,
            id=labels.id,
            # Kept in an offline run too, where `wandb sync` reads it: a part that resumes is
            # added to the parts before it, one that does not takes their place.
            resume="allow" if labels.resumed else None,
        )
        self.log_adapter = log_adapter
        self.variant = labels.choices.get("lora", labels.method)
        self.last_step = 0

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run; when it begins, W&B is told how each number is summed up."""
        begins = self._experiment is None
        run = super().experiment
        if begins:
            run.define_metric(STEP, hidden=True)
            run.define_metric("epoch", hidden=True)
            for name, best in BEST.items():
                run.define_metric(name, step_metric=STEP, step_sync=True, summary=f"{best},last")
            run.define_metric("eval/*", step_metric=STEP, step_sync=True, summary="last")
        return run

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs a step."""
        self.last_step = self.last_step if step is None else step
        super().log_metrics(metrics, step)

    def finish(self, record: RunRecord, folder: Path) -> None:
        """Ends the run with what its record says; a run that failed has failed there, too."""
        answers = {k: v for k, v in record.metrics.items() if k.startswith("eval/")}
        if answers:
            self.log_metrics(answers, self.last_step)
        run = self.experiment
        run.summary.update(summary(record, folder / "metrics.csv"))
        if self.log_adapter and record.status == "ok":
            run.log_artifact(self._artifact(record, folder), aliases=[f"seed-{record.seed}"])
        if record.status == "interrupted":
            run.mark_preempting()  # it is to go on
        run.finish(exit_code=0 if record.status in ("ok", "pruned") else 1)

    def _artifact(self, record: RunRecord, folder: Path) -> Any:
        """The trained weights, with what they are for and how good they are."""
        import wandb

        weights = next(path for name in ("adapter", "model") if (path := folder / name).is_dir())
        name = re.sub(r"[^\w.-]", "-", f"{self.variant}-{record.run_id}", flags=re.ASCII)
        about = {
            "base_model": record.models.get("student", {}),
            "run_id": record.run_id,
            "experiment": record.experiment_name,
            "choices": record.choices,
            "seed": record.seed,
            "metrics": record.metrics,
        }
        artifact = wandb.Artifact(name, type="model", metadata=about)
        # immutable: W&B reads them where they lie, and makes no copy in its cache
        artifact.add_dir(str(weights), name=weights.name, policy="immutable")
        return artifact


def summary(record: RunRecord, log: Path) -> dict[str, Any]:
    """What a run comes to: the record's metrics and numbers, its status, and what stopped it.

    The best of a validation metric is taken from the whole of `metrics.csv`: W&B itself knows
    those since the last resume only.
    """
    numbers: dict[str, Any] = dict(numbers_of(record))
    logged = _columns(log)
    for name, best in BEST.items():
        if name in numbers:
            pick = min if best == "min" else max
            found = pick([numbers[name], *logged.get(name, [])])
            numbers[name] = {best: found, "last": numbers[name]}
    # Of a run that went on, an error of before must not stay.
    return numbers | {"status": record.status, "error": record.error or "", "run_id": record.run_id}


def _columns(log: Path) -> dict[str, list[float]]:
    """The logged values of every metric, as far as they are numbers."""
    found: dict[str, list[float]] = {}
    if log.is_file():
        with log.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, text in row.items():
                    if text and (value := float(text)) == value:
                        found.setdefault(name, []).append(value)
    return found
