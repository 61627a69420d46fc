"""A table as CSV, for programs: recorded units and all digits."""

import csv
import io

from neo.results.against import Comparison
from neo.results.notes import failure
from neo.results.summary import Summary, spelt_values, summarize
from neo.results.tables import Table

Comparisons = dict[str, dict[int, Comparison | None]]


def render_csv(table: Table) -> str:
    """Return the table as CSV: recorded units, all digits, mean, std and n per column.

    A row has the number of its finished runs and of its others, and why these did not finish. A
    column with `range` has its lowest and highest number, too. A compared one has the mean
    difference to the baseline, the ends of its interval, p, p after Holm's correction, and the
    number of pairs. A config value stands there once. A quoted number stands alone, with its
    source in a column of its own. Where the table is turned, so is the CSV.
    """
    found = {column.key: table.comparisons(column) for column in table.spec.columns}
    lines = [_line(table, i, found) for i in range(len(table.rows))]
    text = io.StringIO()
    if table.spec.transpose:
        keys = [key for key in lines[0] if key not in ("group", "row")]  # it has no groups
        turned = csv.writer(text, lineterminator="\n")
        turned.writerows([key, *(line[key] for line in lines)] for key in ("row", *keys))
        return text.getvalue()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(table: Table, i: int, comparisons: Comparisons) -> dict[str, float | int | str | None]:
    row = table.rows[i]

    def num_runs(number: int) -> int | None:
        return None if row.spec.is_quoted else number

    found: dict[str, float | int | str | None] = {
        "group": row.spec.group,
        "row": row.spec.label,
        "n": num_runs(len(row.runs)),
        "not_finished": num_runs(len(row.failed)),
        "why": "; ".join(failure(run) for run in row.failed),
    }
    if any(other.is_quoted for other in table.spec.rows):
        found["source"] = row.spec.source
    for column in table.spec.columns:
        key = column.key
        if column.source == "config":
            found[key] = spelt_values(row.runs, key)
            continue
        summary = summarize(row.runs, key)
        if row.spec.is_quoted:
            summary = Summary(mean=row.spec.quoted.get(key), std=None, n=0)
        found |= {key: summary.mean, f"{key}_std": summary.std, f"{key}_n": num_runs(summary.n)}
        if column.range:
            found |= {f"{key}_low": summary.low, f"{key}_high": summary.high}
        if column.compare:
            shown = comparisons[key].get(i)
            paired = shown.paired if shown else None
            found |= {
                f"{key}_difference": paired.difference if paired else None,
                f"{key}_difference_low": paired.low if paired else None,
                f"{key}_difference_high": paired.high if paired else None,
                f"{key}_p": paired.p if paired else None,
                f"{key}_p_holm": shown.p_holm if shown else None,
                f"{key}_pairs": paired.n if paired else None,
            }
    return found
