"""The table of a comparison: rows are choices, differences are to the baseline."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from neo.results.choice import Choice
from neo.results.markdown import render_markdown
from neo.results.records import RunRecord, command_line, write_atomically
from neo.results.summary import spell
from neo.results.table_csv import render_csv
from neo.results.table_spec import read_table_spec
from neo.results.tables import build_table

CHOSEN = "chosen.md"
LABELS = {
    "eval/mini/exact_match": "exact match",
    "val/kd": "val kd",
    "val/ce": "val ce",
    "num_trainable_parameters": "trainable parameters",
    "num_tokens": "supervised",
    "peak_memory_gib": "peak memory",
    "seconds": "time",
}


def write_table(
    folder: Path,
    over: str,
    search: Mapping[str, Any],
    baseline: Any,
    chosen: Sequence[Choice],
    records: Sequence[RunRecord],
    notes: list[str],
    halving: Mapping[str, Any] | None,
) -> str:
    """Writes table.yaml, table.md and table.csv into the folder, and returns the Markdown."""
    spec = {
        "title": f"{over}: each at its own {search['key']}, paired seeds",
        "command": shlex.join(a.removeprefix("++") for a in command_line(sys.argv)),
        "note": _note(over, search, records, halving),
        "include": CHOSEN,
        "baseline": spell(baseline),
        "interval": "bootstrap",
        "rows": [{"label": spell(c.value), "where": {over: c.value}} for c in chosen],
        "columns": [*_columns(over, search["metric"], records), {"config": search["key"]}],
    }
    text = "# Written by a comparison; changed, it is rendered as it says.\n"
    text += OmegaConf.to_yaml(OmegaConf.create(spec))
    # a file that the table includes, so that whoever renders it again says it, too
    write_atomically(folder / CHOSEN, ("\n".join(notes) + "\n").encode())
    write_atomically(folder / "table.yaml", text.encode())
    table = build_table(read_table_spec(folder / "table.yaml"), list(records))
    markdown = render_markdown(table)
    write_atomically(folder / "table.md", markdown.encode())
    write_atomically(folder / "table.csv", render_csv(table).encode())
    return markdown


def _columns(over: str, metric: str, records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """What is compared: exact match where rows were answered, and what was held out.

    Between losses the divergence is in units of each, so that its numbers are not compared.
    """
    measured = {name for run in records for name in run.metrics}
    names = [n for n in ("eval/mini/exact_match", metric, "val/kd", "val/ce") if n in measured]
    own_units = {"val/kd": "val kd, of each loss"} if over.split(".")[0] == "loss" else {}
    measures: list[dict[str, Any]] = [
        {"metric": name, "label": own_units.get(name, LABELS.get(name, name))}
        | ({} if name in own_units else {"compare": True})
        for name in dict.fromkeys(names)
    ]
    fields = ("num_trainable_parameters", "num_tokens", "peak_memory_gib", "seconds")
    return measures + [{"field": name, "label": LABELS[name]} for name in fields]


def _note(
    over: str,
    search: Mapping[str, Any],
    records: Sequence[RunRecord],
    halving: Mapping[str, Any] | None,
) -> str:
    """The budget and how the rates came about, in words."""
    ended = [run for run in records if run.status == "ok"]
    tokens = sorted({run.num_tokens for run in ended if run.num_tokens is not None})
    spent = (
        " to ".join(f"{num:,}" for num in dict.fromkeys((tokens[0], tokens[-1])))
        if tokens
        else "no"
    )
    steps = max((run.config["trainer"]["max_steps"] for run in ended), default=-1)
    long = f"{steps} steps, " if steps > 0 else ""
    split = {run.config.get("eval_split") for run in ended}
    test = (
        "Test rows were answered by these runs alone; val/... is of the rows that the "
        f"{search['key']} was chosen by."
    )
    if split != {"test"}:
        test = f"No test row was answered: {search['metric']} is of the rows it was chosen by."
    stopped = ""
    if halving is not None:
        stopped = (
            f" Runs of the search were stopped early, behind step {halving['first']} and so on, "
            f"where they were not among the best 1 in {halving['factor']} of those before them "
            "(asynchronous halving, in the order of the grid)."
        )
    return (
        f"Every run has the same rows and steps: {long}{spent} supervised tokens.{stopped} The "
        f"{search['key']} of each choice of {over} was found by {search['metric']} on the "
        f"validation rows, from {', '.join(map(spell, search['values']))}, with seeds "
        f"{', '.join(map(str, search['seeds']))}, which are not reported. {test}"
    )
