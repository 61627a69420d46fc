"""Numbers and cells as every format of a table prints them."""

from dataclasses import dataclass

MISSING = "—"


@dataclass(frozen=True)
class Cell:
    """What one cell of a table shows, in no format yet.

    Attributes:
        text: The whole of it, or the part that may be marked.
        bold: Whether `text` is marked as clearly good.
        italic: Whether `text` is the label of a reference row, or a quoted number.
        rest: What follows, never marked.
    """

    text: str
    bold: bool = False
    italic: bool = False
    rest: str = ""


def number(value: float | int, decimals: int, *, sign: bool = False) -> str:
    """Return the number with `decimals` places and separated thousands; never a minus zero."""
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
    rounded = round(float(value), decimals) + 0.0
    return f"{rounded:+,.{decimals}f}" if sign and rounded else f"{rounded:,.{decimals}f}"


def p_value(p: float) -> str:
    """Return a p-value with three places."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"
