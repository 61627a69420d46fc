"""What makes a comparison unfair, and refuses it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neo.config import ConfigError, run_id
from neo.results.records import find_records, read_record
from neo.results.summary import lookup, spell
from neo.training.run_folder import recorded_run
from neo.training.sweep import SweepFailed
from neo.training.sweep_check import Job

SAME = ("data", "trainer")  # what makes the budget: rows, steps and how they are grouped
UNKNOWN = ("failed", "oom", "interrupted")  # a run that ended so says nothing of its rate


def refuse_unequal(configs: Sequence[Mapping[str, Any]], over: str) -> None:
    """Raises ConfigError where runs differ in what makes the budget.

    Args:
        configs: Of all runs.
        over: What is compared.
    """
    differing = {
        f"{group}.{key}"
        for group in SAME
        for config in configs
        for key in config[group].keys() | configs[0][group].keys()
        if config[group].get(key) != configs[0][group].get(key)
    }
    if differing:
        raise ConfigError(
            [f"{key}: is not the same for all choices of {over}" for key in differing]
        )


def refuse_unfinished(searched: Mapping[tuple[Any, Any, int], Job]) -> None:
    """Raises SweepFailed where a run of the search says nothing of its rate.

    A rate that diverges or is given up is a bad one. One whose run was killed, say, is unknown, and
    what is chosen without it would use up the test rows. A choice none of whose runs came to its
    end is no matter of a rate, and left out.

    Args:
        searched: Choice, rate and seed to the job.
    """
    unknown: dict[Any, list[str]] = {}
    for (choice, rate, seed), job in searched.items():
        run = recorded_run(job.folder, job.identity)
        if run is not None and run.status in UNKNOWN:
            line = f"{spell(choice)}, {spell(rate)}, seed {seed}: {run.status}: {run.error}"
            unknown.setdefault(choice, []).append(line)
    lines = [
        line
        for choice, own in unknown.items()
        if len(own) < sum(key[0] == choice for key in searched)
        for line in own
    ]
    if lines:
        raise SweepFailed(
            f"{len(lines)} runs of the search have no number; no rate was chosen and no test row "
            "answered; retry=failed runs them again:\n  " + "\n  ".join(lines)
        )


def refuse_second_look(
    folder: Path, over: str, key: str, now: Mapping[Any, Mapping[str, Any]]
) -> None:
    """Raises ConfigError where test rows were answered before by other runs than are to be.

    Another rate or budget that is tried after that is tried by who has seen them. Other seeds of
    the same are no second look.

    Args:
        folder: Of the experiment's runs.
        over: What is compared.
        key: What was chosen for each.
        now: Choice to the config of one of its runs.
    """
    seen = {}
    for path in find_records(folder):
        run = read_record(path)
        choice = lookup(run, over)
        if run.config.get("eval_split") != "test" or choice not in now:
            continue
        if _but_for_seed(run.config) != _but_for_seed(now[choice]):
            seen[spell(choice)] = f"{over}={spell(choice)} by run {run.run_id}, {key}=" + spell(
                lookup(run, key)
            )
    if seen:
        raise ConfigError(
            [
                f"{folder}: test rows were answered already with another {key} or budget "
                f"({'; '.join(seen.values())}). A second choice behind that is no fair one: take "
                "another experiment_name"
            ]
        )


def _but_for_seed(config: Mapping[str, Any]) -> str:
    return run_id({**config, "seed": 0})
