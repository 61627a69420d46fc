"""The main job: compose, validate, skip if recorded, build, fit, record.

Usage: python -m neo.train [group=choice ...] [key=value ...]; `--help` explains.
"""

import logging
import os
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from neo.config import ConfigError, build, conf_dir, open_groups, register, resolve, run_id, validate
from neo.data.datamodule import DataModule
from neo.data.packing import RowReport
from neo.models.student import inner, save_student
from neo.results.records import RunRecord, finite, provenance, read_record, write_record
from neo.training.callbacks import DivergedError, PeakMemory, ProgressBar, StopOnNaN, Throughput
from neo.training.exact_match import exact_match
from neo.training.loggers import MetricsFile
from neo.training.meet import Meeting, meet
from neo.training.module import NeoModule
from neo.training.summary import print_plan, print_result

console = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """The command line; exits with 2 where the config is refused, with 1 where a run failed."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, not to Hydra's printer
    sys.argv[1:] = open_groups(sys.argv[1:])
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    try:
        entry(_job)()
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        lines = [str(error), *([str(error.__cause__)] if error.__cause__ is not None else [])]
        console.print("\n".join(dict.fromkeys(lines)), markup=False)
        sys.exit(2)
    except ValueError as error:  # of the user's data or models, found while training
        console.print(str(error), markup=False)
        sys.exit(1)


def _job(composed: DictConfig) -> None:
    train(composed)


def train(composed: DictConfig) -> RunRecord | None:
    """One run, from its composed config to its record; None for a dry run.

    Raises:
        ConfigError: The config cannot run; nothing was loaded or written.
    """
    config = resolve(composed)
    validate(config)
    identity = run_id(config)
    folder = Path(config["run_dir"] or f"runs/{config['experiment_name']}/{identity}")
    if (recorded := _recorded(folder, identity)) is not None and not config["rerun"]:
        if not config["dry_run"]:
            console.print(f"run {identity} is recorded in {folder}; rerun=true trains it again")
            return recorded
    _quiet()
    L.seed_everything(config["seed"], workers=True, verbose=False)
    specs = {key: build(config[key]) for key in ("student", "teacher", "lora", "loss", "data", "optim")}
    if specs["teacher"].path is None:
        specs["teacher"] = None
    meeting = meet(specs["student"], specs["teacher"], specs["lora"], specs["data"].max_length)
    data = _open_data(specs["data"], meeting.tokenizer, config)
    print_plan(console, config, folder, meeting, data)
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
            num_trainable_parameters=self.meeting.num_trainable_parameters,
            num_tokens=self.num_tokens,
            seconds=round(time.perf_counter() - began, 3),
            peak_memory_gib=self.peak_gib,
            rows=_row_counts(self.data.report),
            models={
                role: {"path": spec.path} | spec.identity()
                for role in ("student", "teacher")
                if (spec := self.specs[role]) is not None
            },
            data={"path": self.config["data"].get("path", "mini"), "num_rows": self.data.num_rows, "schema": self.data.schema},
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
        step = torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"] if resuming else None
        if resuming:
            console.print(f"going on from step {step} of {checkpoint}")
        module = NeoModule(
            **{key: self.specs[key] for key in ("student", "teacher", "lora", "loss", "optim")},
            vocab=self.meeting.vocab,
            seed=config["seed"],
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
            self.peak_gib = self.memory.gib()
            self.metrics |= {k: float(v) for k, v in trainer.callback_metrics.items()}
            self.metrics["perf/tokens_per_s"] = self.throughput.tokens_per_s(module)
            if self.peak_gib is not None:
                self.metrics["perf/peak_mem_gib"] = self.peak_gib
        if self.data.num_val_rows:
            (last,) = trainer.validate(module, datamodule=self.data, verbose=False)
            self.metrics |= {k: float(v) for k, v in last.items()}
        if config["eval_split"]:
            source = self.data.data
            rows = source.test_rows() if config["eval_split"] == "test" else source.val_rows()
            self.metrics |= exact_match(inner(module.student), self.meeting.tokenizer, self.data.encoder, rows)
        trainer.save_checkpoint(checkpoint)
        save_student(module.student, self.meeting.tokenizer, folder)

    def _trainer(self, resume_step: int | None) -> L.Trainer:
        """Lightning's Trainer of the config, with our callbacks and loggers."""
        config = self.config
        checkpoints = ModelCheckpoint(
            dirpath=self.folder / "checkpoints",
            save_last=True,
            save_top_k=0,
            every_n_train_steps=config["checkpoint_every_n_steps"],
            save_on_train_epoch_end=False,
            enable_version_counter=False,
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
        # Not built from the node alone: these keys are what the callbacks and the data rely on.
        keys = {k: v for k, v in config["trainer"].items() if k != "_target_"}
        no_val = {} if self.data.num_val_rows else {"limit_val_batches": 0}
        return L.Trainer(
            **keys | {"enable_progress_bar": False} | no_val,
            callbacks=callbacks,
            logger=loggers,
            enable_model_summary=False,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )


def _open_data(spec: Any, tokenizer: Any, config: dict[str, Any]) -> DataModule:
    """The rows, opened: a missing or malformed file is found before a weight is read."""
    try:
        data = DataModule(spec, tokenizer, seed=config["seed"])
        data.setup("fit")
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error
    if data.num_rows is None and config["trainer"].get("max_steps", -1) <= 0:
        raise ConfigError(["trainer.max_steps=-1: must be set, the length of this data is not known"])
    return data


def _recorded(folder: Path, identity: str) -> RunRecord | None:
    """The record of a run that came to its end; failed ones are run again."""
    path = folder / "record.json"
    if not path.exists():
        return None
    record = read_record(path)
    if record.run_id != identity:
        raise ConfigError(
            [f"run_dir={str(folder)!r}: holds run {record.run_id}, this config is run {identity}"]
        )
    return record if record.status == "ok" else None


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
    """Group choices and overrides as typed; empty where a config was composed without Hydra's main."""
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


if __name__ == "__main__":
    main()
