"""Trials of a study run as the jobs of a sweep, and what each of them came to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neo.config import ConfigError
from neo.results.records import RunRecord
from neo.results.summary import number_of
from neo.training.command_line import console
from neo.training.space import spelt, typed
from neo.training.sweep import Sweep, SweepFailed

if TYPE_CHECKING:
    from neo.training.study import Asked, Trials

# What a trial of several runs came to is what the first of these says that one of them has.
WORST_FIRST = ("interrupted", "failed", "oom", "diverged", "pruned")


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    status: str
    value: float | None
    error: str | None


class Trying(Sweep):
    """A sweep whose jobs are the trials of studies."""

    def try_out(
        self,
        searches: Sequence[tuple["Trials", list[str]]],
        seeds: Sequence[int | None],
        most: int = 1,
    ) -> None:
        """Asks for trials, runs and tells them until no study has one left.

        Where a study has a pruner, the first seed of a trial decides whether it is hopeless, and
        the others are run of a trial that is not.

        Args:
            searches: Studies, each with the overrides that its trials share.
            seeds: Of every trial, whose value is the mean over them.
            most: How many trials of each study run at a time.
        """
        judged = any(trials.spec.pruner is not None for trials, _ in searches)
        while True:
            batch = [
                (trials, shared, asked) for trials, shared in searches for asked in trials.ask(most)
            ]
            if not batch:
                return
            ran: dict[int, list[RunRecord | None]] = {index: [] for index in range(len(batch))}
            refused: dict[int, ConfigError] = {}
            for some in (seeds[:1], seeds[1:]) if judged and len(seeds) > 1 else (seeds,):
                alive = [i for i in ran if i not in refused and all(map(_is_ok, ran[i]))]
                jobs = {i: trial_jobs(*batch[i], some, seeds[0]) for i in alive}
                for i, records in self._run(jobs, refused).items():
                    ran[i] += records
            for i, (trials, _, asked) in enumerate(batch):
                if i in refused:
                    outcome = Outcome("failed", None, "; ".join(refused[i].problems))
                else:
                    outcome = outcome_of(ran[i], trials.spec.metric)
                trials.tell(asked, outcome.status, outcome.value, outcome.error)
                console.print(f"trial {asked.number}: {spelt(asked.point)}: {_said(outcome)}")

    def _run(
        self, jobs: Mapping[int, list[list[str]]], refused: dict[int, ConfigError]
    ) -> dict[int, list[RunRecord | None]]:
        """The records of each trial; one whose values do not go together is refused alone."""
        if not jobs:
            return {}
        try:
            records = iter(self.run_jobs([job for one in jobs.values() for job in one]))
        except ConfigError as error:
            if len(jobs) == 1:
                refused |= dict.fromkeys(jobs, error)
                return {}
            alone = (self._run({index: one}, refused) for index, one in jobs.items())
            return {index: ran for each in alone for index, ran in each.items()}
        return {index: [next(records) for _ in one] for index, one in jobs.items()}


def trial_jobs(
    trials: "Trials",
    shared: list[str],
    asked: "Asked",
    seeds: Sequence[int | None],
    judge: int | None,
) -> list[list[str]]:
    """The overrides of a trial's runs; the one of seed `judge` reports to the study."""
    jobs = []
    for seed in seeds:
        job = [*shared, *typed(asked.point)] + ([] if seed is None else [f"seed={seed}"])
        if trials.spec.pruner is not None and seed == judge:
            place = trials.spec.storage.replace("\\", "\\\\").replace("'", "\\'")
            job.append(
                f"prune={{storage:'{place}',study:'{trials.spec.name}',trial:{asked.number}}}"
            )
        jobs.append(job)
    return jobs


def outcome_of(records: Sequence[RunRecord | None], metric: str) -> Outcome:
    """What a trial came to: the mean over its runs, or what kept one of them from its end.

    Raises:
        SweepFailed: A run came to its end without the metric, as all others would.
    """
    statuses = ["interrupted" if record is None else record.status for record in records]
    for status in WORST_FIRST:
        if status in statuses:
            record = records[statuses.index(status)]
            return Outcome(status, None, None if record is None else record.error)
    values = []
    for record in records:
        assert record is not None
        value = number_of(record, metric)
        if value is None:
            known = ", ".join(sorted(key for key in record.metrics if key.startswith("val/")))
            raise SweepFailed(f"metric={metric}: run {record.run_id} has none; it has {known}")
        values.append(value)
    return Outcome("ok", math.fsum(values) / len(values), None)


def _is_ok(record: RunRecord | None) -> bool:
    return record is not None and record.status == "ok"


def _said(outcome: Outcome) -> str:
    if outcome.value is not None:
        return f"{outcome.value:.5g}"
    return f"{outcome.status}: {outcome.error}" if outcome.error else outcome.status
