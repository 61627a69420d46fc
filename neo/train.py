"""The main job: compose, validate, skip if recorded, build, fit, record.

Usage: python -m neo.train [group=choice ...] [key=value ...]; `--help` explains.
"""

import logging
import math
import os
import re
import sys
import time
import traceback
import warnings
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from torch import nn

from neo.config import (
    GROUPS,
    SPECS,
    ConfigError,
    RunConfig,
    build,
    conf_dir,
    meant,
    open_groups,
    register,
    resolve,
    run_id,
)
from neo.data.datamodule import DataModule
from neo.data.packing import RowReport
from neo.models.start import Start
from neo.models.student import inner, trained_parameters
from neo.results.records import RunRecord, finite, provenance, read_record, write_record
from neo.training.callbacks import ProgressBar, Throughput
from neo.training.checkpoint_callback import Checkpoints
from neo.training.checkpoints import newest_good, remove_checkpoints
from neo.training.consistency import check_config
from neo.training.ending import OutputError, ended_by, write_student
from neo.training.exact_match import exact_match
from neo.training.launch import (
    LAUNCHED,
    ProcessesFailed,
    in_process_group,
    is_first_process,
    run_processes,
    tell_launcher,
)
from neo.training.loggers import MetricsFile, finish
from neo.training.meet import Meeting, meet_all
from neo.training.module import NeoModule, whole_student
from neo.training.out_of_memory import OutOfMemory
from neo.training.peak_memory import PeakMemory
from neo.training.run_folder import recorded_run
from neo.training.signals import Interrupted, StopSignals, requeue
from neo.training.skipped_steps import DivergedError
from neo.training.summary import print_plan, print_result
from neo.training.trainer import build_trainer, num_processes

# What a user's config, and what a user's data, models or machine may raise.
REFUSED = (ConfigError, HydraException, OmegaConfBaseException)
FAILED = (
    ValueError,
    DivergedError,
    ProcessesFailed,
    MisconfigurationException,
    OutOfMemory,
    OutputError,
)
CHOICES = "teacher=none, lora=none or logger=csv"

console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not is_first_process())


def main() -> None:
    """The command line; exits with 2 where the config is refused, with 1 where a run failed."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    sys.argv[1:] = open_groups(sys.argv[1:])
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    try:
        entry(_job)()
    except REFUSED as error:  # before the job began, or by a job of a sweep
        _leave(error, 2)
    except FAILED as error:
        _leave(error, 1 if HydraConfig.initialized() else 2)
    except Exception as error:
        tell_launcher(error)
        raise


def _job(composed: DictConfig) -> None:
    try:
        train(composed)
    except (*REFUSED, *FAILED) as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            traceback.clear_frames(error.__traceback__)  # which hold the models of this job
            raise  # the other jobs of the sweep go on, and Hydra raises it at the end
        _leave(error, 2 if isinstance(error, REFUSED) else 1)


def _leave(error: Exception, status: int) -> NoReturn:
    """Exits with a message in place of a traceback."""
    tell_launcher(error)
    speaker = f"rank {os.environ.get('RANK')}: " if in_process_group() else ""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        speaker + _explain(error), markup=False
    )
    sys.exit(status)


def _explain(error: Exception) -> str:
    """The message of a refusal; where it is Hydra's, in terms of our groups and keys."""
    text = str(error).split("\nConfig search path")[0]
    if text.startswith("Config group override must be"):
        nulls = [a for a in sys.argv[1:] if re.fullmatch(rf"({'|'.join(GROUPS)})=(null)?", a)]
        return f"{' '.join(nulls)}: a group takes the name of a file in conf/, such as {CHOICES}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return text
    if found := re.search(r"Could not override '([^']*)'|Key '(\w+)' not in 'RunConfig'", text):
        key, groups = found[1] or found[2], [*GROUPS, "experiment"]
        keys = [field.name for field in fields(RunConfig) if field.name not in groups]
        guess = meant(key, [*groups, *keys])
        return (
            f"{key}: no such group or key{guess}; the groups are {', '.join(groups)}, "
            f"the other keys {', '.join(keys)}"
        )
    return text if error.__cause__ is None else f"{text}\n{error.__cause__}"


def train(composed: DictConfig) -> RunRecord | None:
    """One run, from its composed config to its record; None for a dry run.

    Raises:
        ConfigError: The config cannot run; nothing was loaded or written.
    """
    config = resolve(composed)
    _quiet()
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
    if LAUNCHED not in os.environ:
        print_plan(console, config, specs, folder, meeting, data)
    if config["dry_run"]:
        return None
    run = Run(config, identity, folder, specs, meeting, data)
    if in_process_group():
        return run.record()
    trainer = config["trainer"]
    if trainer.get("num_nodes", 1) > 1:
        raise ConfigError(
            [
                f"trainer.num_nodes={trainer['num_nodes']}: start the command on every node, with "
                "torchrun or srun; README, Many devices"
            ]
        )
    num = num_processes(trainer)
    return run.record() if num == 1 else run.launch(num)


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
        self.checkpoints = Checkpoints(
            folder / "checkpoints", config["checkpoint_every_n_steps"],
            config["keep_last"], config["keep_best"], console.print,
        )  # fmt: skip
        self.signals = StopSignals(self.checkpoints)
        self.num_trainable_parameters = meeting.num_trainable_parameters
        self.num_tokens: int | None = None
        self.report: RowReport | None = None  # of all processes, where they came to the end
        self.peak_gib: float | None = None

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
            run_processes(num, list(HydraConfig.get().overrides.task))
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
            self.folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(self.config), self.folder / "config.yaml")
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
        record = None
        if is_first_process():
            record, unwritten = self._write(status, error)
            raised = raised or unwritten
            if isinstance(raised, Interrupted):
                requeue(raised, console.print)
        if raised is not None:
            raise raised
        return record

    def _write(self, status: str, error: str | None) -> tuple[RunRecord, OutputError | None]:
        """The record, and what kept it from the disk."""
        if num_failures := self.checkpoints.files.num_failures:
            self.metrics["perf/failed_checkpoints"] = num_failures
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
            },
            data={
                "path": self.config["data"].get("path", "mini"),
                "num_rows": self.data.num_rows,
                "schema": self.data.schema,
            },
            argv=["neo-train", *(argument.removeprefix("++") for argument in sys.argv[1:])],
            **provenance(torch.cuda.get_device_name() if gpu else None),
        )
        unwritten = None
        try:
            write_record(record, self.folder)
        except OSError as full:
            console.print(f"{self.folder}/record.json could not be written: {full}")
            unwritten = OutputError(f"{self.folder}/record.json: {full}")
        print_result(console, record, self.folder)
        return record, unwritten

    def _fit(self) -> None:
        """Trains, validates, answers, and writes the trained weights."""
        config = self.config
        if config["rerun"] and is_first_process():
            remove_checkpoints(self.checkpoints.folder)
        checkpoint = None
        if not config["rerun"]:
            checkpoint = newest_good(self.checkpoints.folder, console.print)
        step = start = None
        if checkpoint is not None:
            held = torch.load(checkpoint, weights_only=True, map_location="cpu")
            step, kept = held["global_step"], held["neo"]["start"]
            start = None if kept is None else Start(**kept)
            del held  # Lightning loads the weights and moments itself
            self.checkpoints.written = step
            console.print(f"going on from step {step} of {checkpoint}")
        module = NeoModule(
            **{key: self.specs[key] for key in ("student", "teacher", "lora", "loss", "optim")},
            vocab=self.meeting.vocab,
            seed=config["seed"],
            start=start,
            memory=self.memory,
            compile_layers=config["torch_compile"],
            max_skipped_steps=config["max_skipped_steps"],
        )
        self.trainer = trainer = self._trainer(step)
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
        self.report = _of_all_processes(self.data.report)
        if self.data.num_val_rows:
            (last,) = trainer.validate(module, datamodule=self.data, verbose=False)
            self.metrics |= {k: float(v) for k, v in last.items()}
            self.checkpoints.score(trainer, last["val/loss"])
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

    def _trainer(self, resume_step: int | None) -> L.Trainer:
        """Lightning's Trainer of the config, with our callbacks and loggers."""
        config = self.config
        callbacks: list[L.Callback] = [self.throughput, self.signals, self.checkpoints]
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
        return build_trainer(
            config["trainer"] | no_val, callbacks, loggers, sharding=config["sharding"]
        )


def _of_all_processes(report: RowReport) -> RowReport:
    """What all of them have read in the last epoch; all must call."""
    if not torch.distributed.is_initialized():
        return report
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, report)
    return sum(reports, RowReport())


def _row_counts(report: RowReport) -> dict[str, Any]:
    """What became of the rows of the last epoch."""
    return {
        "read": report.rows,
        "used": report.rows - report.num_bad,
        "truncated": report.truncated,
        "bad": dict(report.bad),
    }


def _hydra_choices() -> tuple[dict[str, str], list[str]]:
    """Group choices and overrides as typed; empty where Hydra's main did not compose the config."""
    if not HydraConfig.initialized():
        return {}, []
    hydra_config = HydraConfig.get()
    choices = {k: str(v) for k, v in hydra_config.runtime.choices.items() if "/" not in k}
    return choices, [override.removeprefix("++") for override in hydra_config.overrides.task]


def _quiet() -> None:
    """Silences what Lightning says about settings that are ours on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    # PEFT 0.21 asks transformers, and Lightning 2.6 asks torch, by a name about to go.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".isinstance.treespec, LeafSpec.. is deprecated")


if __name__ == "__main__":
    main()
