"""Tables that are written before their runs: which rows may stand empty, and what they wait for."""

import difflib
from collections.abc import Collection, Mapping

from neo.results.row_spec import RowSpec
from neo.results.table_spec import TableSpec


def check_all_pending(spec: TableSpec) -> None:
    """Raise ValueError where a row of a table without a record does not say that it waits."""
    for i, row in enumerate(spec.rows):
        if not row.pending and not row.is_quoted:
            raise ValueError(
                f"rows[{i}] ({row.name}): there is no record yet; train first and give runs=DIR, "
                "or say 'pending: true' where the row is to stand empty until then"
            )


def check_waits(
    rows: Collection[RowSpec], choices: Mapping[str, Collection[str]], keys: Collection[str]
) -> None:
    """Raise ValueError where a row waits for a run that cannot come, as no config is like that.

    Args:
        rows: Rows that no run matches.
        choices: Config group to what can be chosen of it.
        keys: The other keys at the root of a config; what stands under them is not checked.
    """
    for row in rows:
        place = f"row {row.name!r} waits for runs, and its 'where'"
        for key, values in row.where.items():
            legal = [*choices, *keys]
            if key not in choices and key.partition(".")[0] not in legal:
                raise ValueError(f"{place} names {key!r}, no group or key{_near(key, legal)}")
            for value in values if key in choices else []:
                if value not in choices[key]:
                    raise ValueError(
                        f"{place} names {value!r}, no choice of {key}"
                        f"{_near(str(value), choices[key])}"
                    )


def _near(word: str, legal: Collection[str]) -> str:
    near = difflib.get_close_matches(word, legal, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; legal: {', '.join(sorted(legal))}"
