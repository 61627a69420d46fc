"""Numbers of an evaluation in the record they belong to, each with how it was taken."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from neo.results.evaluations import with_evaluation
from neo.results.records import RunRecord, read_record, write_record

LOCK = ".lock"  # the one that a run holds while it trains


def recorded_numbers(
    record: RunRecord | None, unit: str, deciding: Mapping[str, Any]
) -> dict[str, float | int] | None:
    """The numbers of a unit that was evaluated just so; None where it was not, or not wholly."""
    for entry in [] if record is None else record.evaluations:
        whole = len(entry["tasks"]) == entry["num_tasks"]
        if entry["name"] == unit and whole and entry["settings"] == dict(deciding):
            prefixes = tuple(f"eval/{task}/" for task in entry["tasks"])
            assert record is not None
            return {n: v for n, v in record.metrics.items() if n.startswith(prefixes)}
    return None


def read_if_there(folder: Path) -> RunRecord | None:
    """The record of a folder; None where it has none yet."""
    file = folder / "record.json"
    return read_record(file) if file.is_file() else None


def record_evaluation(
    folder: Path, fresh: RunRecord | None, entry: dict[str, Any], numbers: Mapping[str, float]
) -> RunRecord:
    """Writes the numbers into the folder's record, which is read anew for it, and returns it.

    Args:
        folder: Holds the record.
        fresh: Of a base or a teacher, the record it begins as; None for a run, which has one.
        entry: How the numbers were taken.
        numbers: By the names of `neo.results.metrics`.

    Raises:
        ValueError: A number would take the place of one that no evaluation has written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK, timeout=60):  # several evaluations may end at once
        known = read_if_there(folder) or fresh
        if known is None:
            raise ValueError(f"{folder}: its record.json is gone")
        if fresh is not None:  # parameters of the model, which an older record may lack
            known = replace(known, num_parameters=fresh.num_parameters)
        record = with_evaluation(known, entry, numbers)
        write_record(record, folder)
    return record
