"""What a sweep says at its end: how many runs have numbers, and why the others have none."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neo.results.records import RunRecord
from neo.training.sweep_check import Job


def print_summary(
    console: Console,
    jobs: Sequence[Job],
    records: Mapping[str, RunRecord | None],
    before: Mapping[str, RunRecord | None],
) -> None:
    """Says how the runs of a sweep ended.

    Args:
        console: Where to.
        jobs: A job for each run.
        records: Of the runs by id; None where there is none.
        before: What was recorded when the sweep began.
    """
    counts = Counter(_status(records[job.identity]) for job in jobs)
    known = sum(
        record is not None and record == before[identity] for identity, record in records.items()
    )
    said = ", ".join(f"{num} {status}" for status, num in counts.most_common())
    if known:
        said += f"; {known} of them were recorded before"
    table = Table(
        title=f"sweep {jobs[0].config['experiment_name']}: {len(jobs)} runs: {said}",
        title_justify="left", box=None, pad_edge=False, show_header=False,
    )  # fmt: skip
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for job in jobs:
        record = records[job.identity]
        if record is None or record.status != "ok":
            why = record.error if record is not None and record.error else ""
            table.add_row(_status(record), job.identity, escape(f"{job.name}: {why}"))
    console.print(table)


def _status(record: RunRecord | None) -> str:
    return "not recorded" if record is None else record.status
