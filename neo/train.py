"""The main job: compose, validate, skip if recorded, build, fit, record.

Usage: python -m neo.train [group=choice ...] [key=value ...]; `--help` explains.
"""

import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from neo.config import SPECS, build, conf_dir, open_groups, register, resolve, run_id
from neo.data.datamodule import DataModule
from neo.data.packing import RowReport
from neo.models.start import Start
from neo.models.student import inner, save_student, trained_parameters
from neo.results.records import RunRecord, finite, provenance, write_record
from neo.training.callbacks import (
    Checkpoints,
    DivergedError,
    ProgressBar,
    StopOnNaN,
    Throughput,
)
from neo.training.command_line import REFUSED, console, leave, quiet
from neo.training.consistency import check_config
from neo.training.exact_match import exact_match
from neo.training.loggers import MetricsFile, finish
from neo.training.meet import Meeting, meet_all
from neo.training.module import NeoModule
from neo.training.peak_memory import PeakMemory
from neo.training.preflight import planned_or_refused
from neo.training.run_folder import recorded_run
from neo.training.summary import print_plan, print_result
from neo.training.trainer import build_trainer

# What a user's data, models or machine may raise.
FAILED = (ValueError, DivergedError, MisconfigurationException, torch.OutOfMemoryError)


def main() -> None:
    """The command line; exits with 2 where the config is refused, with 1 where a run failed."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    sys.argv[1:] = open_groups(sys.argv[1:])
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    try:
        entry(_job)()
    except REFUSED as error:  # before the job began, or by a job of a sweep
        leave(error, 2)
    except FAILED as error:
        leave(error, 1 if HydraConfig.initialized() else 2)


def _job(composed: DictConfig) -> None:
    try:
        train(composed)
    except (*REFUSED, *FAILED) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # the other jobs of the sweep go on, and Hydra raises it at the end
        leave(error, 2 if isinstance(error, REFUSED) else 1)


def train(composed: DictConfig) -> RunRecord | None:
    """One run, from its composed config to its record; None for a dry run.

    Raises:
        ConfigError: The config cannot run; nothing was loaded or written.
    """
    config = resolve(composed)
    quiet()
    check_config(config)
    identity = run_id(config)
    folder = Path(config["run_dir"] or f"runs/{config['experiment_name']}/{identity}")
    recorded = recorded_run(folder, identity)
    if recorded is not None and not config["rerun"] and not config["dry_run"]:
        console.print(f"run {identity} is recorded in {folder}; rerun=true trains it again")
        return recorded
    L.seed_everything(config["seed"], workers=True, verbose=False)
    specs = {key: build(config[key]) for key in SPECS}
    if specs["teacher"].path is None:
        specs["teacher"] = None
    meeting, data = meet_all(config, specs)
    plan = planned_or_refused(config, specs, meeting.vocab, data)
    print_plan(console, config, specs, folder, meeting, data, plan)
    if config["dry_run"]:
        return None
    return Run(config, identity, folder, specs, meeting, data).record()


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
    ) -> None:
        self.config, self.identity, self.folder = config, identity, folder
        self.specs, self.meeting, self.data = specs, meeting, data
        self.metrics: dict[str, float] = {}
        self.throughput, self.memory = Throughput(), PeakMemory()
        self.num_trainable_parameters = meeting.num_trainable_parameters
        self.num_tokens: int | None = None
        self.peak_gib: float | None = None

    def record(self) -> RunRecord:
        """Trains and writes the record; what stops the run is recorded, then raised."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(self.config), self.folder / "config.yaml")
        (self.folder / "record.json").unlink(missing_ok=True)
        began, started_at = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        status, error, raised = "ok", None, None
        try:
            self._fit()
        except BaseException as exception:
            status, raised = _status_of(exception), exception
            error = f"{type(exception).__name__}: {exception}".splitlines()[0]
        choices, overrides = _hydra_choices()
        trainer = self.__dict__.get("trainer")
        for logger in [] if trainer is None else trainer.loggers:
            finish(logger, ok=status == "ok")
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
            started_at=started_at,
            metrics=finite(self.metrics),
            num_parameters=self.meeting.num_parameters,
            num_trainable_parameters=self.num_trainable_parameters,
            num_tokens=self.num_tokens,
            seconds=round(time.perf_counter() - began, 3),
            peak_memory_gib=self.peak_gib,
            rows=_row_counts(self.data.report),
            models={
                role: {"path": spec.path} | spec.identity()
                for role in ("student", "teacher")
                if (spec := self.specs[role]) is not None
            },
            data={
                "path": self.config["data"].get("path", "mini"),
                "num_rows": self.data.num_rows,
                "schema": self.data.schema,
            },
            argv=["neo-train", *(argument.removeprefix("++") for argument in sys.argv[1:])],
            **provenance(torch.cuda.get_device_name() if gpu else None),
        )
        write_record(record, self.folder)
        print_result(console, record, self.folder)
        if raised is not None:
            raise raised
        return record

    def _fit(self) -> None:
        """Trains, validates, answers, and writes the trained weights."""
        config, folder = self.config, self.folder
        checkpoint = folder / "checkpoints" / "last.ckpt"
        resuming = checkpoint.exists() and not config["rerun"]
        step = start = None
        if resuming:
            held = torch.load(checkpoint, weights_only=True, map_location="cpu")
            step, kept = held["global_step"], held["neo"]["start"]
            start = None if kept is None else Start(**kept)
            del held  # Lightning loads the weights and moments itself
            console.print(f"going on from step {step} of {checkpoint}")
        module = NeoModule(
            **{key: self.specs[key] for key in ("student", "teacher", "lora", "loss", "optim")},
            vocab=self.meeting.vocab,
            seed=config["seed"],
            start=start,
            memory=self.memory,
        )
        self.trainer = trainer = self._trainer(step)
        try:
            trainer.fit(
                module,
                datamodule=self.data,
                ckpt_path=str(checkpoint) if resuming else None,
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
        if self.data.num_val_rows:
            (last,) = trainer.validate(module, datamodule=self.data, verbose=False)
            self.metrics |= {k: float(v) for k, v in last.items()}
        if config["eval_split"]:
            source: Any = self.data.data
            rows = source.test_rows() if config["eval_split"] == "test" else source.val_rows()
            self.metrics |= exact_match(
                inner(module.student), self.meeting.tokenizer, self.data.encoder, rows
            )
        trainer.save_checkpoint(checkpoint)
        save_student(module.student, self.meeting.tokenizer, folder)

    def _trainer(self, resume_step: int | None) -> L.Trainer:
        """Lightning's Trainer of the config, with our callbacks and loggers."""
        config = self.config
        checkpoints = Checkpoints(
            self.folder / "checkpoints" / "last.ckpt", config["checkpoint_every_n_steps"]
        )
        callbacks: list[L.Callback] = [self.throughput, StopOnNaN(), checkpoints]
        if config["trainer"]["enable_progress_bar"]:
            callbacks.append(ProgressBar(self.throughput))
        loggers = [MetricsFile(self.folder, resume_step)]
        extra = {}
        if config["logger"]["_target_"] != "neo.training.loggers.none":
            extra = {"save_dir": str(self.folder), "group": config["experiment_name"],
                     "name": self.identity, "id": self.identity}  # fmt: skip
        if (logger := build(config["logger"] | extra)) is not None:
            logger.log_hyperparams(config | {"choices": _hydra_choices()[0]})
            loggers.append(logger)
        no_val = {} if self.data.num_val_rows else {"limit_val_batches": 0}
        return build_trainer(config["trainer"] | no_val, callbacks, loggers)


def _row_counts(report: RowReport) -> dict[str, Any]:
    """What became of the rows of the last epoch."""
    return {
        "read": report.rows,
        "used": report.rows - report.num_bad,
        "truncated": report.truncated,
        "bad": dict(report.bad),
    }


def _status_of(exception: BaseException) -> str:
    if isinstance(exception, torch.OutOfMemoryError | MemoryError):
        return "oom"
    if isinstance(exception, DivergedError):
        return "diverged"
    return "interrupted" if isinstance(exception, KeyboardInterrupt | SystemExit) else "failed"


def _hydra_choices() -> tuple[dict[str, str], list[str]]:
    """Group choices and overrides as typed; empty where Hydra's main did not compose the config."""
    if not HydraConfig.initialized():
        return {}, []
    hydra_config = HydraConfig.get()
    choices = {k: str(v) for k, v in hydra_config.runtime.choices.items() if "/" not in k}
    return choices, [override.removeprefix("++") for override in hydra_config.overrides.task]


if __name__ == "__main__":
    main()
