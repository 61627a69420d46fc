"""What stands under a table: what its numbers mean, and what they were made from."""

from collections import Counter

from neo.results import against
from neo.results.printing import MISSING
from neo.results.records import RunRecord
from neo.results.row_spec import RowSpec
from neo.results.tables import Table


def rule(table: Table) -> str:
    """Return what the cells mean and when one is bold."""
    spec = table.spec
    text = (
        f"Mean ± sample standard deviation over n seeds, without ± where all are equal; {MISSING} "
        f"was not measured{' or is not quoted' if any(r.is_quoted for r in spec.rows) else ''}."
    )
    if any(column.range for column in spec.columns):
        text += " In square brackets the lowest and the highest seed."
    if spec.baseline:
        text += f" Bold: better than {spec.baseline} by the paired test of the second table."
    elif any(column.better for column in spec.columns) and _competes(table):
        text += " " + against.leader_note(has_groups=table.has_groups, turned=spec.transpose)
    if table.failed:
        text += " A run that did not finish stands in brackets beside n and is in no mean."
    if any(row.reference for row in spec.rows):
        kind = "Columns" if spec.transpose else "Rows"
        text += f" {kind} in italics are for reference and do not compete."
    if any(row.paper for row in spec.rows):
        text += " In brackets the paper's number and ours minus it."
    return " ".join([text, *outstanding(table)])


def outstanding(table: Table) -> list[str]:
    """Return a sentence for each source of quoted rows, and one for the rows without a run."""
    labels = {column.key: column.label for column in table.spec.columns}
    sources: dict[str, list[RowSpec]] = {}
    for row in table.spec.rows:
        if row.is_quoted:
            sources.setdefault(row.source, []).append(row)
    found = []
    for source, rows in sources.items():
        text = f"Quoted and not measured here: {'; '.join(row.name for row in rows)}; from {source}"
        for row in rows:
            missing = [labels[key] for key, value in row.quoted.items() if value is None]
            text += f"; not given of {row.name}: {', '.join(missing)}" if missing else ""
        found.append(f"{text}.")
    if table.not_run:
        found.append(f"Not run yet: {'; '.join(row.name for row in table.not_run)}.")
    return found


def _competes(table: Table) -> bool:
    """Whether any group has two rows that could be compared."""
    rows = Counter(row.group for row in table.spec.rows if not row.reference)
    return max(rows.values(), default=0) > 1


def against_note(table: Table) -> str:
    """Return what the numbers of the comparison with the baseline mean."""
    columns = [column for column in table.spec.columns if column.compare]
    found = [shown for column in columns for shown in table.comparisons(column).values()]
    pairs = max((shown.paired.n for shown in found if shown is not None), default=0)
    return against.note(table.spec.baseline, pairs, table.spec.interval)


def failures(table: Table) -> list[str]:
    """Return row, seed, run, status and reason of every run that did not finish."""
    return [f"{label}, {failure(run)}" for label, run in table.failed]


def failure(run: RunRecord) -> str:
    """Return seed, run, status and reason of a run that did not finish, on one line."""
    why = f" ({' '.join(run.error.split())})" if run.error else ""
    return f"seed {run.seed}, run {run.run_id}: {run.status}{why}"


def origin(table: Table) -> list[str]:
    """Return command, code, dates, device and versions of the runs, as a list."""
    runs = table.runs
    facts = {"Command": f"`{table.spec.command}`" if table.spec.command else ""}
    if runs:
        codes = {
            (run.commit[:7] if run.commit else "no commit known")
            + (" with local changes" if run.dirty else "")
            for run in runs
        }
        first, last = min(run.started_at for run in runs), max(run.started_at for run in runs)
        versions = {f"{name} {version}" for run in runs for name, version in run.versions.items()}
        facts["Code"] = ", ".join(sorted(codes))
        facts["Runs"] = f"{len(runs)}, started {first} to {last}"
        facts["Device"] = "; ".join(sorted({run.device or "not recorded" for run in runs}))
        facts["Versions"] = ", ".join(sorted(versions))
        facts["Evaluated"] = "; ".join(_evaluations(table))
    return [f"{name}: {value}" for name, value in facts.items() if value]


def _evaluations(table: Table) -> list[str]:
    """Return how the numbers of a harness were taken, each way once, with the rows it was of."""
    shown = {column.key.split("/")[1] for column in table.spec.columns if "/" in column.key}
    ways: dict[str, None] = {}
    for run in table.runs:
        for entry in run.evaluations:
            for task, how in entry["tasks"].items():
                if task in shown:
                    shots = f", {n} shots" if (n := how.get("num_fewshot")) else ""
                    limit = entry["settings"].get("limit")
                    cut = f", limit={limit}" if limit is not None else ""
                    version = entry["settings"].get("harness", "(version not recorded)")
                    rows = f"{how['num_rows']:,} rows" if "num_rows" in how else "all rows"
                    ways[f"{task} by lm-evaluation-harness {version}: {rows}{shots}{cut}"] = None
    return sorted(ways)
