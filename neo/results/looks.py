"""How rows, groups and runs look in a figure: colours, dashes, marks, and the notes below."""

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too (Okabe and Ito 2008); the order
# puts a light one beside a dark one, so that neighbours differ in grey print as well.
COLOURS = ("#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442")
HATCHES = ("", "//", "..", "xx")
REFERENCE_LINES = ("--", ":", "-.", (0, (5, 1)))
# For lines and marks, where the yellow would be hard to see on white.
LINE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#333333")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX"
GREY = "#555555"


def group_looks(labels: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Return colour, dashes and mark per label, no two labels alike among the first 28."""
    n = len(LINE_COLOURS)
    return {
        label: (
            LINE_COLOURS[i % n],
            DASHES[i // n % len(DASHES)],
            MARKERS[(i + i // n) % len(MARKERS)],
        )
        for i, label in enumerate(labels)
    }


def write_notes(axes: Axes, notes: Sequence[str], width: int) -> None:
    """Write what is not drawn, and how to read the panel, small and below its lowest label.

    Args:
        axes: To write below.
        notes: One after the other.
        width: Characters that a line takes.
    """
    if notes:
        axes.annotate(
            textwrap.fill(" · ".join(notes), width),
            xy=(0, 0),
            xycoords=("axes fraction", axes.xaxis.label),
            xytext=(0, -3),
            textcoords="offset points",
            va="top",
            fontsize=9,
            color="#555555",
        )


def axis_text(name: str, labels: Mapping[str, str], unit: str) -> str:
    """Return the table's label of `name` with the unit of what is drawn."""
    text = labels.get(name, name)
    return f"{text} ({unit})" if unit else text
