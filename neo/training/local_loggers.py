"""A run in TensorBoard or MLflow: the same names and numbers as everywhere else."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from neo.results.records import RunRecord
from neo.results.summary import numbers_of
from neo.training.run_labels import RunLabels


class TensorBoardRun(TensorBoardLogger):
    """Lightning's TensorBoard logger, in a folder of the run."""

    def __init__(self, labels: RunLabels) -> None:
        # What was logged past the place it goes on from is hidden, as metrics.csv drops it.
        purged = labels.resume_step or 0
        super().__init__(
            labels.folder, name="", version="tensorboard", default_hp_metric=False,
            purge_step=purged,
        )  # fmt: skip
        self.parameters = labels.flat()
        self.last_step = purged

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs a step; `epoch`, which Lightning adds to everything, is left out."""
        self.last_step = self.last_step if step is None else step
        super().log_metrics({k: v for k, v in metrics.items() if k != "epoch"}, step)

    def finish(self, record: RunRecord, folder: Path) -> None:
        """Ends the run with its status; the tab HPARAMS compares those whose numbers are final.

        TensorBoard keeps the first table of a folder, so one that is to go on writes none.
        """
        said = "  \n".join(text for text in (record.status, record.error) if text)
        self.experiment.add_text("status", said, self.last_step)
        if record.status in ("ok", "pruned"):
            final = {f"final/{name}": float(value) for name, value in numbers_of(record).items()}
            self.log_hyperparams(self.parameters, final, self.last_step)
        self.experiment.close()


class MLflowRun(MLFlowLogger):
    """Lightning's MLflow logger, which finds a run again that goes on."""

    def __init__(self, labels: RunLabels, address: str) -> None:
        super().__init__(
            experiment_name=labels.experiment,
            run_name=labels.name,
            tracking_uri=address,
            tags={"neo.id": labels.id, "method": labels.method, **labels.choices},
        )
        self.found = False
        if labels.resumed:
            self._find(labels.id)
        self.last_step = 0

    @rank_zero_only
    def _find(self, id: str) -> None:
        """Goes on with the newest run of that id, if there is one."""
        experiment = self._mlflow_client.get_experiment_by_name(self._experiment_name)
        if experiment is not None:
            runs = self._mlflow_client.search_runs(
                [experiment.experiment_id], f"tags.`neo.id` = '{id}'", max_results=1,
                order_by=["attributes.start_time DESC"],
            )  # fmt: skip
            if runs:
                self._run_id, self.found = runs[0].info.run_id, True
                self._mlflow_client.update_run(self._run_id, status="RUNNING")

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Logs the config, once: MLflow refuses another value, such as of another device."""
        if not self.found:
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs a step, by names that MLflow takes; `epoch` is left out."""
        self.last_step = self.last_step if step is None else step
        named = {
            re.sub(r"[^\w/. -]", "_", name, flags=re.ASCII): value
            for name, value in metrics.items()
            if name != "epoch"
        }
        if named:
            super().log_metrics(named, self.last_step)

    def finish(self, record: RunRecord, folder: Path) -> None:
        """Ends the run with the record's numbers, its status, and what stopped it."""
        known = ("train/", "val/")  # which were logged as they came
        left = {k: float(v) for k, v in numbers_of(record).items() if not k.startswith(known)}
        self.log_metrics(left, self.last_step)
        client = self.experiment
        client.set_tag(self.run_id, "status", record.status)
        client.set_tag(self.run_id, "error", record.error or "")
        ends = {"ok": "FINISHED", "pruned": "FINISHED", "interrupted": "KILLED"}
        client.set_terminated(self.run_id, ends.get(record.status, "FAILED"))
