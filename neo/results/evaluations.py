"""Evaluations in a record: numbers that were taken of a model after it was trained."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neo.results.records import SCHEMA_VERSION, RunRecord


def is_untrained(record: RunRecord) -> bool:
    """Return whether the record is of a base or a teacher that an evaluation has made it for."""
    return "evaluated" in record.config


def with_evaluation(
    record: RunRecord, entry: Mapping[str, Any], numbers: Mapping[str, float | int]
) -> RunRecord:
    """Return the record with the numbers of one more evaluation.

    A task has the numbers of its newest evaluation only: an older one loses the task, and is gone
    once it has lost all. Numbers that are NaN or infinite are left out.

    Args:
        record: Of any readable version; the one returned is of the newest.
        entry: As in `RunRecord.evaluations`.
        numbers: Of the entry's tasks, by the names of `neo.results.metrics`.

    Raises:
        ValueError: A number that no evaluation has written has one of these names.
    """
    tasks = set(entry["tasks"])
    own = tuple(f"eval/{task}/" for task in tasks)
    evaluated = tuple(f"eval/{task}/" for old in record.evaluations for task in old["tasks"])
    for name in record.metrics:
        if name.startswith(own) and not name.startswith(evaluated):
            raise ValueError(
                f"metrics.{name}: was recorded by the run itself; a task of that name cannot be "
                "evaluated beside it"
            )
    kept = []
    for old in record.evaluations:
        left = {task: how for task, how in old["tasks"].items() if task not in tasks}
        if left:
            kept.append({**old, "tasks": left})
    metrics = {name: n for name, n in record.metrics.items() if not name.startswith(own)}
    new = {name: n for name, n in numbers.items() if math.isfinite(n)}
    return replace(
        record,
        metrics=metrics | new,
        evaluations=[*kept, dict(entry)],
        schema_version=SCHEMA_VERSION,
    )


def without_evaluations(record: RunRecord) -> RunRecord:
    """Return the record as the run itself wrote it."""
    names = tuple(f"eval/{task}/" for entry in record.evaluations for task in entry["tasks"])
    metrics = {
        name: n for name, n in record.metrics.items() if not names or not name.startswith(names)
    }
    return replace(record, metrics=metrics, evaluations=[], schema_version=SCHEMA_VERSION)
