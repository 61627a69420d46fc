"""Whether an answer to a word problem gives the right number."""

import re
from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

# Where the copies of the data sets on the hub keep the number.
COLUMNS = ("Answer", "result")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|-?\.\d+")


def same_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the first number of the answer is the row's own, however it is written.

    Example:
        >>> same_number({"Answer": "1450.0"}, [" $1,450 in all."])
        {'exact_match': 1.0}
    """
    right = next(str(doc[column]) for column in COLUMNS if column in doc)
    given, wanted = first_number(results[0]), first_number(right)
    if wanted is None:
        raise ValueError(f"the row's answer {right!r} holds no number")
    return {"exact_match": float(given is not None and isclose(given, wanted, rel_tol=1e-6))}


def first_number(text: str) -> float | None:
    """The first number of a text, fractions such as 3/4 divided out; None where there is none."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    above, _, below = found[0].replace(",", "").partition("/")
    if not below:
        return float(above)
    return float(above) / float(below) if float(below) else None
