"""Numbers and lines as the tables print them."""

from collections.abc import Sequence

MISSING = "—"


def number(value: float | int, decimals: int, *, sign: bool = False) -> str:
    """Return the number with `decimals` places and separated thousands; never a minus zero."""
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0.
    rounded = round(float(value), decimals) + 0.0
    return f"{rounded:+,.{decimals}f}" if sign and rounded else f"{rounded:,.{decimals}f}"


def p_value(p: float) -> str:
    """Return a p-value with three places."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def line(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(plain(text) for text in cells)} |"


def plain(text: str) -> str:
    """Return the text on one line, safe inside a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
