"""Which rows are held out for validation, duplicates together."""

import json
from collections.abc import Iterable
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np

from neo.data.rows import BadRow, to_conversation


def row_key(row: Any, schema: str) -> bytes | None:
    """The SHA-256 of the row's conversation, the same for equal conversations; None for a bad row.

    Bad rows have no key and are never held out, so that they are counted in training, once.
    """
    try:
        conversation = to_conversation(row, schema)
    except BadRow:
        return None
    text = json.dumps(conversation, sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).digest()


def is_held_out(key: bytes | None, share: float) -> bool:
    """Whether a conversation of a stream is for validation: its key lies in that share of keys."""
    return key is not None and int.from_bytes(key[:8], "big") < share * 2**64


def split_table(
    keys: Iterable[bytes | None], share: float, max_rows: int | None
) -> tuple[list[int], list[int]]:
    """The places of the training rows and of the validation rows, both ascending.

    Conversations go to validation whole, in the order of their keys, until the share of the rows
    is reached (at least one row, at most `max_rows`); one with too many duplicates is passed over.
    """
    groups: dict[bytes, list[int]] = {}
    count = 0
    for place, key in enumerate(keys):
        count += 1
        if key is not None:
            groups.setdefault(key, []).append(place)
    if not groups:
        return list(range(count)), []  # all bad, which whoever reads them says with the reasons
    wanted = max(1, round(share * count))
    wanted = wanted if max_rows is None else min(wanted, max_rows)
    held: set[int] = set()
    for key in sorted(groups):
        if len(held) == wanted:
            break
        if len(held) + len(groups[key]) <= wanted:
            held.update(groups[key])
    if not held or len(groups) < 2:
        raise ValueError(
            f"data.val_share={share}: {count} rows with {len(groups)} distinct conversations "
            f"cannot give {wanted} for validation and leave some to train on. Use more rows, "
            "another share, or data.val_share=0 for no validation"
        )
    return [place for place in range(count) if place not in held], sorted(held)


def held_out_rows(
    rows: Iterable[Any], schema: str, share: float, max_val_rows: int | None, max_rows: int | None
) -> list[Any]:
    """The first rows for validation among the first `max_rows` of a stream."""
    first = islice(iter(rows), max_rows)
    held = (row for row in first if is_held_out(row_key(row, schema), share))
    found = list(islice(held, max_val_rows))
    if not found:
        raise ValueError(
            f"data.val_share={share}: no row of the stream (data.max_rows={max_rows}) falls under "
            "it. Use more rows, a larger share, or data.val_share=0 for no validation"
        )
    return found


def table_keys(rows: Any, indices: np.ndarray, schema: str) -> list[bytes | None]:
    """The keys of these rows, in their order."""
    return [row_key(rows[int(index)], schema) for index in indices]
