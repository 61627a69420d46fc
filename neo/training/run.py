"""A run: trains, whatever becomes of it leaves a record, and goes on where it was stopped."""

import math
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from neo.config import ConfigError, build
from neo.data.datamodule import DataModule
from neo.data.packing import RowReport
from neo.models.start import Start
from neo.models.student import inner, trained_parameters
from neo.results.records import (
    RunRecord,
    finite,
    provenance,
    read_record,
    write_atomically,
    write_record,
)
from neo.training.cache_report import CertifyCache, cache_metrics
from neo.training.cached_targets import CachedTargets
from neo.training.callbacks import ProgressBar, Throughput
from neo.training.checkpoint_callback import Checkpoints
from neo.training.checkpoints import newest_good, remove_checkpoints
from neo.training.ending import OutputError, ended_by, write_student
from neo.training.exact_match import exact_match
from neo.training.job import command_of_job, hydra_choices
from neo.training.launch import ProcessesFailed, is_first_process, run_processes
from neo.training.loggers import finish
from neo.training.meet import Meeting
from neo.training.metrics_file import MetricsFile
from neo.training.module import NeoModule
from neo.training.peak_memory import PeakMemory
from neo.training.pruning import pruning
from neo.training.run_cache import RunCache
from neo.training.run_labels import RunLabels
from neo.training.signals import Interrupted, StopSignals, requeue
from neo.training.skipped_steps import DivergedError
from neo.training.split import whole_student
from neo.training.summary import print_result
from neo.training.trainer import build_trainer


class Run:
    """A run that has passed every check: trains, and leaves a record whatever happens."""

    def __init__(
        self,
        config: dict[str, Any],
        identity: str,
        folder: Path,
        specs: dict[str, Any],
        meeting: Meeting,
        data: DataModule,
        console: Console,
    ) -> None:
        self.console = console
        self.config, self.identity, self.folder = config, identity, folder
        self.specs, self.meeting, self.data = specs, meeting, data
        self.metrics: dict[str, float] = {}
        self.cached = self._cached()
        self.throughput, self.memory = Throughput(), PeakMemory()
        self.checkpoints = Checkpoints(
            folder / "checkpoints", config["checkpoint_every_n_steps"],
            config["keep_last"], config["keep_best"], self.console.print,
        )  # fmt: skip
        self.signals = StopSignals(self.checkpoints)
        self.num_trainable_parameters = meeting.num_trainable_parameters
        self.num_tokens: int | None = None
        self.report: RowReport | None = None  # of all processes, where they came to the end
        self.peak_gib: float | None = None

    def _cached(self) -> CachedTargets | None:
        """What reads the run's cache, a batch ahead of every step that asks for it."""
        cache: RunCache | None = self.specs["cache"]
        if cache is None:
            return None
        cached = CachedTargets(cache, self.data.train_stream().pad_id)
        if self.specs["loss"].kd_ratio > 0:
            self.data.prepare["train"] = cached.prepare(0)
        self.data.prepare["val"] = cached.prepare(self.data.val_part)
        return cached

    def launch(self, num: int) -> RunRecord:
        """Trains in so many processes; the first of them writes the record.

        Where one of them fails, or is killed, the record says so: what the first one saw may be no
        more than that it was left alone.
        """
        if not HydraConfig.initialized():
            raise ConfigError(
                [f"trainer.devices={num}: from Python, start the processes with torchrun"]
            )
        self._begin()
        try:
            overrides = HydraConfig.get().overrides
            run_processes(num, overrides.task, overrides.hydra)
        except ProcessesFailed as failure:
            written = self._written()
            if written is not None and written.status == "interrupted":
                sys.exit(failure.exit_code)
            if written is None:
                self._write("failed", str(failure))
            elif failure.rank > 0 and written.status == "failed":
                write_record(replace(written, error=str(failure)), self.folder)
            raise
        written = self._written()
        assert written is not None
        return written

    def _written(self) -> RunRecord | None:
        file = self.folder / "record.json"
        return read_record(file) if file.exists() else None

    def _begin(self) -> None:
        """What a run leaves before it has done anything."""
        self.began = time.perf_counter()
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        if is_first_process():
            self.data_identity = self.data.data.identity()
            self.folder.mkdir(parents=True, exist_ok=True)
            # whole or not at all: other processes may be reading it
            content = OmegaConf.to_yaml(OmegaConf.create(self.config))
            write_atomically(self.folder / "config.yaml", content.encode())
            (self.folder / "record.json").unlink(missing_ok=True)

    def record(self) -> RunRecord | None:
        """Trains and writes the record; what stops the run is recorded, then raised.

        Of several processes the first one writes it, and the others have none.
        """
        self._begin()
        status, error = "ok", None
        raised: BaseException | None = None
        try:
            with self.signals:
                self._fit()
        except BaseException as exception:
            status, raised = ended_by(exception, self.config)
            error = f"{type(raised).__name__}: {raised}".splitlines()[0]
        if self.cached is not None:
            self.cached.close()
        record = None
        if is_first_process():
            record, unwritten = self._write(status, error)
            raised = raised or unwritten
            if isinstance(raised, Interrupted):
                requeue(raised, self.console.print)
        if isinstance(raised, DivergedError) or getattr(raised, "agreed", False):
            self.trainer.strategy.barrier()  # all are here; one that leaves has the others ended
        if raised is not None:
            raise raised
        return record

    def _write(self, status: str, error: str | None) -> tuple[RunRecord, OutputError | None]:
        """The record, and what kept it from the disk."""
        if num_failures := self.checkpoints.files.num_failures:
            self.metrics["perf/failed_checkpoints"] = num_failures
        choices, overrides = hydra_choices()
        trainer = self.__dict__.get("trainer")
        gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        record = RunRecord(
            run_id=self.identity,
            experiment_name=self.config["experiment_name"],
            status=status,
            error=error,
            choices=choices,
            overrides=overrides,
            config=self.config,
            seed=self.config["seed"],
            started_at=self.started_at,
            metrics=finite(self.metrics),
            num_parameters=self.meeting.num_parameters,
            num_trainable_parameters=self.num_trainable_parameters,
            num_tokens=self.num_tokens,
            seconds=round(time.perf_counter() - self.began, 3),
            peak_memory_gib=self.peak_gib,
            rows=_row_counts(self.report or self.data.report),
            models={
                role: {"path": spec.path} | spec.identity()
                for role in ("student", "teacher")
                if (spec := self.specs[role]) is not None
            }
            | ({} if self.cached is None else {"teacher": self.cached.cache.model_record()}),
            data={
                "path": self.config["data"].get("path", "mini"),
                "num_rows": self.data.num_rows,
                "schema": self.data.schema,
                **self.data_identity,
            },
            argv=command_of_job(),
            **provenance(torch.cuda.get_device_name() if gpu else None),
        )
        unwritten = None
        try:
            write_record(record, self.folder)
        except OSError as full:
            self.console.print(f"{self.folder}/record.json could not be written: {full}")
            unwritten = OutputError(f"{self.folder}/record.json: {full}")
        finish([] if trainer is None else trainer.loggers, record, self.folder)
        print_result(self.console, record, self.folder)
        return record, unwritten

    def _fit(self) -> None:
        """Trains, validates, answers, and writes the trained weights."""
        config = self.config
        if config["rerun"] and is_first_process():
            remove_checkpoints(self.checkpoints.folder)
        checkpoint = None
        if not config["rerun"]:
            checkpoint = newest_good(self.checkpoints.folder, self.console.print)
        step = start = kept_id = None
        if checkpoint is not None:
            held = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
            step, kept = held["global_step"], held["neo"]["start"]
            kept_id = held["neo"]["wandb_id"]
            start = None if kept is None else Start(**kept)
            del held  # Lightning loads the weights and moments itself
            self.checkpoints.written = step
            self.console.print(f"going on from step {step} of {checkpoint}")
        module = NeoModule(
            **{key: self.specs[key] for key in ("student", "teacher", "lora", "loss", "optim")},
            vocab=self.meeting.vocab,
            seed=config["seed"],
            cached=self.cached,
            start=start,
            memory=self.memory,
            compile_layers=config["torch_compile"],
            max_skipped_steps=config["max_skipped_steps"],
        )
        self.trainer = trainer = self._trainer(step, kept_id)
        try:
            trainer.fit(
                module,
                datamodule=self.data,
                ckpt_path=None if checkpoint is None else str(checkpoint),
                weights_only=True,
            )
        finally:
            self.num_tokens = int(module.num_tokens)
            self.metrics |= module.init_metrics
            if module.built:  # EVA decides on the ranks when it begins
                self.num_trainable_parameters = sum(
                    p.numel() for p in trained_parameters(module.student).values()
                )
            self.peak_gib = self.memory.gib()
            self.metrics |= {k: float(v) for k, v in trainer.callback_metrics.items()}
            self.metrics["perf/tokens_per_s"] = self.throughput.tokens_per_s(module)
            if self.peak_gib is not None:
                self.metrics["perf/peak_mem_gib"] = self.peak_gib
            if module.skipped.num:
                self.metrics["train/skipped_steps"] = module.skipped.num
        self.checkpoints.save(trainer)  # before what follows can fail or be stopped
        self.signals.check_end(trainer)
        reports = self.data.ranks.gather(self.data.report.plain())
        self.report = sum(map(RowReport.from_plain, reports), RowReport())
        if self.data.num_val_rows:
            (last,) = trainer.validate(module, datamodule=self.data, verbose=False)
            self.metrics |= {k: float(v) for k, v in last.items()}
            self.checkpoints.score(trainer, last["val/loss"])
        if self.cached is not None:
            self.metrics |= cache_metrics(
                self.cached, module.loss, self.data, self.throughput.seconds
            )
        student = whole_student(module)
        if student is not None:
            self._finish(student, saved=self.checkpoints.written == trainer.global_step)
        trainer.strategy.barrier()  # the first process writes, and none leaves before it has
        if not math.isfinite(self.metrics.get("val/loss", 0.0)):
            raise DivergedError(f"val/loss is {self.metrics['val/loss']} behind the last step")

    def _finish(self, student: nn.Module, *, saved: bool) -> None:
        """Answers, and writes the trained weights."""
        if split := self.config["eval_split"]:
            source: Any = self.data.data
            rows = source.test_rows() if split == "test" else source.val_rows()
            self.metrics |= exact_match(
                inner(student), self.meeting.tokenizer, self.data.encoder, rows
            )
        write_student(student, self.meeting.tokenizer, self.folder, saved)

    def _trainer(self, resume_step: int | None, kept_id: str | None) -> L.Trainer:
        """Lightning's Trainer of the config, with our callbacks and loggers."""
        config = self.config
        callbacks: list[L.Callback] = [self.throughput, self.signals, self.checkpoints]
        if config["trainer"]["enable_progress_bar"]:
            callbacks.append(ProgressBar(self.throughput))
        callbacks += pruning(config, self.checkpoints)
        if self.cached is not None:
            callbacks.append(CertifyCache(self.console.print))
        loggers: list[Logger] = [MetricsFile(self.folder, resume_step)]
        # one process speaks for all
        if is_first_process() and (logger := build(config["logger"])) is not None:
            labels = RunLabels(
                config=config, run_id=self.identity, choices=hydra_choices()[0],
                folder=self.folder, resume_step=resume_step, kept_id=kept_id,
            )  # fmt: skip
            loggers.append(logger.build(labels))
        no_val = {} if self.data.num_val_rows else {"limit_val_batches": 0}
        return build_trainer(
            config["trainer"] | no_val, callbacks, loggers, sharding=config["sharding"]
        )


def _row_counts(report: RowReport) -> dict[str, Any]:
    """What became of the rows of the last epoch."""
    return {
        "read": report.rows,
        "used": report.rows - report.num_bad,
        "truncated": report.truncated,
        "bad": dict(report.bad),
    }
