"""The runs of a panel over config keys: their keys' values, their number, and who is left out."""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neo.results.metrics import quantity
from neo.results.records import RunRecord
from neo.results.summary import ABSENT, leaves, lookup, number_of, spell
from neo.results.tables import Table

# Keys of the root config that say nothing about what was trained.
BOOKKEEPING = ("dry_run", "experiment", "experiment_name", "logger", "rerun", "retry", "run_dir")


@dataclass(frozen=True)
class KeyedRun:
    """One run with its values of the panel's keys."""

    run: RunRecord
    values: tuple[Any, ...]


@dataclass(frozen=True)
class MeasuredRun(KeyedRun):
    """One that finished, with its number in the printed unit."""

    number: float


@dataclass(frozen=True)
class KeyedRuns:
    """What a panel over config keys is drawn from.

    Attributes:
        finished: Runs with every key and the number, in its printed unit.
        failed: Runs with every key that did not finish.
        left_out: What is said in the panel about the other runs, a sentence per reason.
    """

    finished: list[MeasuredRun]
    failed: list[KeyedRun]
    left_out: list[str]

    @property
    def not_finished(self) -> str:
        """How many runs did not finish, and how they ended."""
        return ends_of([keyed.run for keyed in self.failed])


def shown_runs(table: Table) -> list[RunRecord]:
    """Return every run of the table but those of reference rows, failed and unmatched ones too.

    A search has runs that no row was written for, and a panel over keys is how they are looked at.
    """
    competing = [row for row in table.rows if not row.spec.reference]
    names = {
        f"{row.spec.group}, {row.spec.label}" if row.spec.group else row.spec.label
        for row in competing
    }
    runs = [run for row in competing for run in row.runs]
    runs += [run for name, run in table.failed if name in names] + table.unmatched
    return list({run.run_id: run for run in runs}.values())


def keyed_runs(runs: Sequence[RunRecord], keys: Sequence[str], name: str) -> KeyedRuns:
    """Return the runs by whether they can be drawn over `keys` with the number `name`."""
    scale = quantity(name)[0].scale
    finished: list[MeasuredRun] = []
    failed: list[KeyedRun] = []
    lacking: Counter[str] = Counter()
    for run in runs:
        values = tuple(lookup(run, key) for key in keys)
        absent = [key for key, value in zip(keys, values, strict=True) if value is ABSENT]
        number = number_of(run, name)
        if absent:
            lacking[absent[0]] += 1
        elif run.status != "ok":
            failed.append(KeyedRun(run, values))
        elif number is None:
            lacking[name] += 1
        else:
            finished.append(MeasuredRun(run, values, scale * number))
    return KeyedRuns(finished, failed, [runs_without(n, key) for key, n in lacking.items()])


def ends_of(runs: Sequence[RunRecord]) -> str:
    """Return how many runs did not finish, and how they ended."""
    ends = Counter(run.status for run in runs)
    kinds = ", ".join(f"{number} {status}" for status, number in sorted(ends.items()))
    return f"not finished: {kinds}"


def runs_without(number: int, what: str) -> str:
    """Return the note that so many runs are left out because they lack something."""
    return f"left out: {number} run{'s' if number > 1 else ''} without {what}"


def require_key(runs: Sequence[RunRecord], key: str, place: str) -> None:
    """Raise ValueError where there are runs, and none has a choice or a config key `key`."""
    if not runs or any(lookup(run, key) is not ABSENT for run in runs):
        return
    known = dict.fromkeys(k for run in runs for k in [*run.choices, *dict(leaves(run.config))])
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"legal: {', '.join(known)}"
    raise ValueError(f"{place}: no record has a choice or a config key {key!r}; {hint}")


def averaged_over(cells: Sequence[Sequence[RunRecord]], keys: Sequence[str]) -> list[str]:
    """Return what differs, besides the seed, between runs that one mean is taken over.

    Within a cell every run should be a seed of one setting; where a seed occurs twice, the mean
    runs over other settings too, and the panel has to say so. A config group whose choice differs
    stands for the keys in it.
    """
    found: list[str] = []
    for runs in cells:
        if len({run.seed for run in runs}) == len(runs):
            continue
        settings = [_setting(run) for run in runs]
        for key in dict.fromkeys(key for setting in settings for key in setting):
            if key not in found and len({setting.get(key) for setting in settings}) > 1:
                found.append(key)
    return [k for k in found if k not in keys and k.partition(".")[0] not in {*found} - {k}]


def _setting(run: RunRecord) -> dict[str, str]:
    values = {k: spell(v) for k, v in leaves(run.config) if k != "seed"}
    return {
        key: value
        for key, value in (run.choices | values).items()
        if key.partition(".")[0] not in BOOKKEEPING
    }
