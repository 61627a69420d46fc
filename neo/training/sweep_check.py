"""The jobs of a sweep, all checked before the first of them starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from neo.config import ConfigError, resolve, run_id
from neo.training.command_line import console, quiet
from neo.training.consistency import check_config
from neo.training.meet import CannotRun, build_specs, meet_all
from neo.training.preflight import RATES, planned_or_refused
from neo.training.run_cache import find_teaching
from neo.training.run_folder import folder_of, recorded_run

# Whether models, rows and memory go together does not depend on these.
FREE = ("seed", "run_dir", "experiment_name", "logger", "rerun", "retry", "prune", "eval_split")
# Where a run runs does not make it another run, unless that is what a sweep compares.
PLACES = (
    "sharding", "torch_compile", "teacher.device", "teacher.offload",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
)  # fmt: skip
SHOWN = 3  # jobs that are named with a problem


@dataclass(frozen=True, eq=False)
class Job:
    """One job: what it is composed of, and where its run lies.

    Args:
        name: Of its overrides those that the other jobs of the sweep lack.
        overrides: All of them.
        config: Resolved.
        identity: Of the run.
        folder: Of the run.
    """

    name: str
    overrides: list[str]
    config: dict[str, Any]
    identity: str
    folder: Path


def check_jobs(
    context: HydraContext,
    master: DictConfig,
    jobs: Sequence[Sequence[str]],
    *,
    only_compose: bool = False,
) -> list[Job]:
    """The jobs, composed, and checked as far as that can be before one runs.

    What a job cannot do though its config is right (its rows are malformed, it does not fit the
    memory) is told here and left to the job, whose record will say it.

    Args:
        context: Hydra's.
        master: The config of the sweep.
        jobs: The overrides of each.
        only_compose: They are not to run, so that nothing needs to be right.

    Raises:
        ConfigError: With all problems of all jobs.
    """
    quiet()
    problems: dict[str, list[str]] = {}  # of what jobs
    groups: dict[str, list[Job]] = {}  # of jobs that meet the same models, rows and memory
    found = []
    shared = set.intersection(*(set(overrides) for overrides in jobs))
    for overrides in jobs:
        swept = [o.removeprefix("++") for o in overrides if o not in shared]
        name = " ".join(swept) or "the only job"
        try:
            job = _compose(context, master, name, list(overrides), not only_compose)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(name)
            continue
        found.append(job)
    if only_compose and not problems:
        return found
    same: dict[str, list[Job]] = {}
    for job in found:
        same.setdefault(job.identity, []).append(job)
    found = [
        _compose(
            context, master, job.name, [*job.overrides, f"distinct=[{','.join(places)}]"], True
        )
        if (places := _compared_places(job, same[job.identity]))
        else job
        for job in found
    ]
    for job in found:
        groups.setdefault(_what_meets(job.config), []).append(job)
    for problem, names in _shared_folders(found).items():
        problems[problem] = names
    cannot: dict[str, list[str]] = {}
    for group in groups.values():
        names = [job.name for job in group]
        try:
            _meet(group[0].config)
        except CannotRun as error:
            cannot.setdefault(" ".join(error.problems), []).extend(names)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).extend(names)
    if problems:
        whole = {problem: len(names) == len(jobs) for problem, names in problems.items()}
        raise ConfigError(
            [p if whole[p] else f"{p} (of {_named(names)})" for p, names in problems.items()]
        )
    for reason, names in cannot.items():
        console.print(f"cannot run, which its record will say: {_named(names)}: {reason}")
    return found


def _compose(
    context: HydraContext, master: DictConfig, name: str, overrides: list[str], check: bool
) -> Job:
    composed = context.config_loader.load_sweep_config(master, overrides)
    # the machine that trains is another one
    elsewhere = "SlurmLauncher" in str(composed.hydra.launcher.get("_target_"))
    with open_dict(composed):
        del composed["hydra"]
    raw = OmegaConf.to_container(composed)
    precision = str(raw["trainer"].get("precision")) if isinstance(raw, dict) else ""
    if check and elsewhere and "auto_precision" in precision:
        raise ConfigError(
            [
                "trainer.precision: follows from the device, and the device is on another machine; "
                "set it, such as trainer.precision=bf16-mixed or 32-true"
            ]
        )
    config = resolve(composed)
    identity = run_id(config)
    folder = folder_of(config, identity)
    if check:
        check_config(config, here=not elsewhere)
        if (nodes := config["trainer"].get("num_nodes", 1)) > 1:
            raise ConfigError(
                [
                    f"trainer.num_nodes={nodes}: a run of many nodes is no job of a sweep; start "
                    "it alone, on every node; README, Many devices"
                ]
            )
        recorded_run(folder, identity)
    return Job(name, overrides, config, identity, folder)


def _compared_places(job: Job, same: Sequence[Job]) -> list[str]:
    """The places in which the job differs from others that are the same run."""
    compared = [p for p in PLACES if any(_at(s.config, p) != _at(job.config, p) for s in same)]
    return sorted({*compared, *(job.config["distinct"] or ())}) if compared else []


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _what_meets(config: Mapping[str, Any]) -> str:
    """Names what models, rows and memory depend on: runs of a sweep often differ in less."""
    kept = {key: value for key, value in config.items() if key not in FREE}
    kept["optim"] = {k: v for k, v in config["optim"].items() if k not in RATES}
    return json.dumps(kept, sort_keys=True)


def _meet(config: dict[str, Any]) -> None:
    specs = build_specs(config)
    meeting, data = meet_all(config, specs)
    specs = find_teaching(config, specs, meeting.vocab, data)
    planned_or_refused(config, specs, meeting.vocab, data)


def _shared_folders(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """Folders that different runs would write into, and the jobs that do."""
    runs: dict[Path, dict[str, Job]] = {}
    for job in jobs:
        runs.setdefault(job.folder, {})[job.identity] = job
    return {
        f"run_dir={str(folder)!r}: is one folder for {len(own)} runs; use null": [
            job.name for job in own.values()
        ]
        for folder, own in runs.items()
        if len(own) > 1
    }


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return "; ".join(names[:SHOWN]) + more
