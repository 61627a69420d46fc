"""Where a wrong answer departs from the right one."""

from neo.data.prompt import IGNORE, Example


def departure(given: Example, right: Example) -> int | None:
    """The first position whose target is not that of the right answer; None where there is none.

    There both answers have the same tokens before them, so it is the one position at which a wrong
    label and a right one answer the same question; what comes behind it goes on from a wrong start.

    Raises:
        ValueError: The two are not answers to one conversation.
    """
    pairs = enumerate(zip(given.targets, right.targets, strict=False))
    # Where one of the two was cut off, nothing says how it would go on.
    at = next((at for at, (a, b) in pairs if a != b and IGNORE not in (a, b)), None)
    # The ids before a departure are the question and what the two answers share.
    stop = min(len(given.input_ids), len(right.input_ids)) if at is None else at + 1
    if given.input_ids[:stop] != right.input_ids[:stop]:
        raise ValueError(
            "right_rows: must be the rows in the same order, with nothing changed but the last "
            f"answer; one begins {right.input_ids[:8]} where the row begins {given.input_ids[:8]}"
        )
    return at
