"""Sweepers for tests: composed as by the command line, with runs that are made up in no time."""

from collections.abc import Callable
from typing import Any

import pytest
from example_runs import example_run
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from neo.config import conf_dir, register
from neo.results.records import RunRecord, write_record
from neo.training import sweep_check
from neo.training.run_folder import recorded_run
from neo.training.sweep_check import Job

# Of a resolved config: status, metrics, and what stopped the run.
Came = Callable[[dict[str, Any]], tuple[str, dict[str, float]]]

COMPOSED: dict[Any, Job] = {}


def made_up(kind: type, came: Came) -> type:
    """The kind of sweeper, whose runs come to what is said of their config, in zero steps."""

    class MadeUp(kind):  # type: ignore[misc]
        ran: list[Job]

        def run_checked(self, checked: Any) -> list[RunRecord | None]:
            return [self.run(job) for job in checked]

        def run(self, job: Job) -> RunRecord:
            if (record := recorded_run(job.folder, job.identity)) is not None:
                return record
            self.ran.append(job)
            status, metrics = came(job.config)
            groups = dict(o.split("=", 1) for o in job.overrides if "." not in o)
            record = example_run(
                run_id=job.identity, experiment_name=job.config["experiment_name"],
                config=job.config, seed=job.config["seed"], metrics=metrics, status=status,
                error=None if status == "ok" else f"it {status}", num_tokens=1000,
                choices={"lora": "lora"} | groups,
            )  # fmt: skip
            write_record(record, job.folder)
            return record

    return MadeUp


def start(kind: type, keys: dict[str, Any], came: Came, *arguments: str) -> Any:
    """A sweeper of these keys, started with these overrides, in the current folder.

    It can be asked what it `ran`, also where it raises: then it is in the exception's `sweeper`.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.types import HydraContext

    register()
    compose, folder = sweep_check._compose, str(conf_dir())

    def once(*given: Any) -> Job:
        key = (arguments, *(tuple(part) for part in given if isinstance(part, list)))
        if key not in COMPOSED:  # which takes most of the time
            COMPOSED[key] = compose(*given)
        return COMPOSED[key]

    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(folder, version_base="1.3"):
        patch.setattr(sweep_check, "_compose", once)
        patch.setattr(sweep_check, "_meet", lambda config: None)  # opens models and rows
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        sweeper = made_up(kind, came)(**keys)
        sweeper.ran = []
        sweeper.config = hydra.compose_config(
            "config", list(arguments), run_mode=RunMode.MULTIRUN, from_shell=False
        )
        sweeper.hydra_context = HydraContext(hydra.config_loader, Callbacks())
        try:
            sweeper.sweep(list(arguments))
        except BaseException as error:
            error.sweeper = sweeper  # type: ignore[attr-defined]
            raise
    return sweeper
