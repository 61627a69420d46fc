"""Where a wrong answer departs from the right one."""

from itertools import zip_longest

from neo.data.prompt import Example


def departure(given: Example, right: Example) -> int | None:
    """The first position whose target is not that of the right answer; None where there is none.

    There both answers have the same tokens before them, so it is the one position at which a wrong
    label and a right one answer the same question; what comes behind it goes on from a wrong start.

    Raises:
        ValueError: The two are not answers to one conversation.
    """
    pairs = zip_longest(given.targets, right.targets)
    at = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    # The ids before a departure are the question and what the two answers share.
    stop = None if at is None else at + 1
    if given.input_ids[:stop] != right.input_ids[:stop]:
        raise ValueError(
            "right_rows: must be the rows in the same order, with nothing changed but the last "
            f"answer; one begins {right.input_ids[:8]} where the row begins {given.input_ids[:8]}"
        )
    return at
