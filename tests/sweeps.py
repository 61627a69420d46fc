"""Sweeps for tests: typed like a user's, run in this process, their jobs in others."""

import sys
from pathlib import Path
from typing import Any

import pytest
from fits import settings

from neo.results.records import RunRecord, find_records, read_record
from neo.train import main

QUICK = ("trainer.max_steps=3", "trainer.max_epochs=-1", "data.packing=false", "data.batch_size=2")


def sweep(*arguments: str) -> int:
    """The exit status of `python -m neo.train -m ...`, run in the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["neo-train", "-m", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def small(
    student: Path, teacher: Path | None, *arguments: str, without: tuple[str, ...] = ()
) -> list[str]:
    """The arguments of a sweep of small runs that lie in runs/default.

    Args:
        student: A model's folder.
        teacher: Another's.
        arguments: Of this sweep, instead of what the small runs have at the same keys.
        without: Keys of the small runs that something else gives.
    """
    keys = {"run_dir", *without, *(argument.split("=")[0] for argument in arguments)}
    given = settings(student, teacher, Path(), *QUICK)
    return [a for a in given if a.split("=")[0] not in keys] + list(arguments)


def records(folder: Path, name: str = "default") -> list[RunRecord]:
    """The records of an experiment below `folder`."""
    return [read_record(path) for path in find_records(folder / "runs" / name)]


def by(found: list[RunRecord], *path: str) -> dict[Any, RunRecord]:
    """The records by a value of their config."""
    keyed = {}
    for record in found:
        value: Any = record.config
        for key in path:
            value = value[key]
        assert value not in keyed
        keyed[value] = record
    return keyed
