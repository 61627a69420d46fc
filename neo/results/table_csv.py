"""A table as CSV, for programs: recorded units and all digits."""

import csv
import io

from neo.results.against import Comparison
from neo.results.notes import failure
from neo.results.summary import spelt_values, summarize
from neo.results.tables import Table

Comparisons = dict[str, dict[int, Comparison | None]]


def render_csv(table: Table) -> str:
    """Return the table as CSV: recorded units, all digits, mean, std and n per column.

    A row has the number of its finished runs and of its others, and why these did not finish. A
    column with `range` has its lowest and highest number, too. A compared one has the mean
    difference to the baseline, the ends of its interval, p, p after Holm's correction, and the
    number of pairs. A config value stands there once.
    """
    found = {column.key: table.comparisons(column) for column in table.spec.columns}
    lines = [_line(table, i, found) for i in range(len(table.rows))]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _line(table: Table, i: int, comparisons: Comparisons) -> dict[str, float | int | str | None]:
    row = table.rows[i]
    found: dict[str, float | int | str | None] = {
        "group": row.spec.group,
        "row": row.spec.label,
        "n": len(row.runs),
        "not_finished": len(row.failed),
        "why": "; ".join(failure(run) for run in row.failed),
    }
    for column in table.spec.columns:
        key = column.key
        if column.source == "config":
            found[key] = spelt_values(row.runs, key)
            continue
        summary = summarize(row.runs, key)
        found |= {key: summary.mean, f"{key}_std": summary.std, f"{key}_n": summary.n}
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
