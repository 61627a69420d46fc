"""Positions drawn: a few rows token by token, and all of them by what their targets are."""

import re
import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from neo.results.figures import DPI, STYLE, WIDTH, png
from neo.results.looks import GREY, group_looks
from neo.results.position_table import (
    BEHIND,
    LABELS,
    RIGHT,
    UNKNOWN,
    WRONG,
    Positions,
    check_together,
)

# Of Okabe and Ito's colours, none that the lines of the first students have (`looks`).
COLOURS = {RIGHT: "#56B4E9", WRONG: "#D55E00", BEHIND: "#CC79A7", UNKNOWN: "#999999"}
HATCHES = {RIGHT: "", WRONG: "//", BEHIND: "..", UNKNOWN: ""}
MAX_ROWS = 4  # side by side, with tokens that can still be read
TITLE_CHARACTERS = 110  # in a line over the whole width
BINS = 10
SPECIAL = re.compile(r"<\|.*\|>|</?s>|<[a-z_]+>")  # as nearly all tokenizers write them


def draw_rows(students: Mapping[str, Positions], titles: Mapping[int, str]) -> bytes:
    """Return a few rows token by token, as PNG.

    Above, the probability of each target: the teacher's as a bar, the students' as marks. Below,
    the divergence of each student as a line, and the teacher's entropy as a bar; where the teacher
    has another token in mind it stands under the target, in brackets.

    Args:
        students: By name, the positions of one student each; all of the same rows.
        titles: By row, what stands above it; up to `MAX_ROWS` rows are drawn, in this order.

    Raises:
        ValueError: There are no rows or too many, or one of them has no positions.
    """
    return png(rows_figure(students, titles))


def rows_figure(students: Mapping[str, Positions], titles: Mapping[int, str]) -> Figure:
    """Return what `draw_rows` draws."""
    first = check_together(students)
    if not 1 <= len(titles) <= MAX_ROWS:
        raise ValueError(f"titles: {len(titles)} rows; between 1 and {MAX_ROWS} can be drawn")
    if missing := [row for row in titles if row not in first.row]:
        last = int(first.row.max())
        raise ValueError(f"titles: no positions of row {missing[0]}; there are rows 0 to {last}")
    widths = [max(int((first.row == row).sum()), 6) + 1 for row in titles]  # room for a title
    with style.context(["default", STYLE]):
        figure = _figure(5.2)
        grid = figure.subplots(
            2, len(titles), sharex="col", sharey="row", squeeze=False, width_ratios=widths
        )
        for column, (row, title) in enumerate(titles.items()):
            upper, lower = grid[:, column]
            own = {name: positions.of_row(row) for name, positions in students.items()}
            _draw_targets(upper, own)
            _draw_gaps(lower, own)
            characters = round(TITLE_CHARACTERS * widths[column] / sum(widths))
            upper.set_title(textwrap.fill(title, characters), fontsize=9, parse_math=False)
        grid[0, 0].set_ylabel("p(target)")
        grid[1, 0].set_ylabel("nats")
        grid[1, 0].set_ylim(0, 1.05 * max(axes.dataLim.y1 for axes in grid[1]))  # shared
        _legend(figure, first, students)
    return figure


def draw_labels(students: Mapping[str, Positions]) -> bytes:
    """Return the positions by what their targets are, as PNG.

    On the left how probable the teacher finds them, as a distribution; on the right each student's
    mean divergence from the teacher.

    Args:
        students: By name, the positions of one student each; all of the same rows.

    Raises:
        ValueError: The positions are not of the same rows, or there are none.
    """
    return png(labels_figure(students))


def labels_figure(students: Mapping[str, Positions]) -> Figure:
    """Return what `draw_labels` draws."""
    first = check_together(students)
    labels = [label for label in LABELS if label in first.label]
    with style.context(["default", STYLE]):
        figure = _figure(3.4)
        left, right = figure.subplots(1, 2)
        edges = np.linspace(0, 1, BINS + 1)
        width = 0.9 / BINS / len(labels)
        for number, label in enumerate(labels):
            probabilities = first.labelled(label).teacher_target
            share = np.histogram(probabilities.clip(0, 1), edges)[0] / len(probabilities)
            left.bar(
                edges[:-1] + 0.05 / BINS + (number + 0.5) * width, 100 * share, width,
                color=COLOURS[label], hatch=HATCHES[label], edgecolor="white", lw=0.6,
                label=f"{label} ({len(probabilities):,})",
            )  # fmt: skip
        left.set(xlabel="teacher's probability of the target", ylabel="share of positions (%)")
        left.set(xlim=(0, 1), ylim=(0, 100))
        left.legend(title="target (positions)", frameon=False, loc="upper center")

        looks = group_looks(list(students))
        width = 0.84 / len(students)
        for number, (name, positions) in enumerate(students.items()):
            means = [positions.labelled(label).kd.mean() for label in labels]
            places = np.arange(len(labels)) - 0.42 + (number + 0.5) * width
            right.bar(places, means, 0.94 * width, color=looks[name][0], label=name)
        right.set_xticks(range(len(labels)), labels)
        right.set(xlabel="target", ylabel="mean kd (nats)")
        right.legend(frameon=False)
        for axes in (left, right):
            axes.grid(axis="y", color="#dddddd", lw=0.8)
            axes.set_axisbelow(True)
    return figure


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _draw_targets(axes: Axes, students: Mapping[str, Positions]) -> None:
    first = next(iter(students.values()))
    places = np.arange(len(first.token))
    for label in LABELS:
        chosen = np.array(first.label) == label
        axes.bar(
            places[chosen], first.teacher_target[chosen], 0.8, color=COLOURS[label],
            hatch=HATCHES[label], edgecolor="white", lw=0.6,
        )  # fmt: skip
    for place, label in enumerate(first.label):  # where the bar itself may be too low to be seen
        if label in (WRONG, BEHIND):
            axes.axvspan(place - 0.5, place + 0.5, color=COLOURS[label], alpha=0.13, lw=0, zorder=0)
    for number, (name, (colour, _, mark)) in enumerate(group_looks(list(students)).items()):
        beside = 0.2 * (number - (len(students) - 1) / 2)  # where they agree, all are seen
        axes.plot(
            places + beside, students[name].student_target, color=colour, marker=mark, ls="none",
            ms=6, mec="white", mew=0.8,
        )  # fmt: skip
    axes.set_ylim(0, 1.05)


def _draw_gaps(axes: Axes, students: Mapping[str, Positions]) -> None:
    first = next(iter(students.values()))
    places = np.arange(len(first.token))
    axes.bar(places, first.teacher_entropy, 0.8, color="#cccccc")
    for name, (colour, dash, mark) in group_looks(list(students)).items():
        axes.plot(
            places, students[name].kd, color=colour, ls=dash, marker=mark, ms=5, lw=1.2, mec="white"
        )
    axes.set_xticks(places, _ticks(first), fontsize=9, parse_math=False)


def _ticks(positions: Positions) -> list[str]:
    """The target, and under it what the teacher would have said if that is something else."""
    told = zip(positions.token, positions.teacher_top, strict=True)
    return [_shown(token) + (f"\n({_shown(top)})" if top != token else "") for token, top in told]


def _shown(token: str) -> str:
    """A token as it can be seen, a special one as a box."""
    return "■" if SPECIAL.fullmatch(token) else token.replace(" ", "␣").replace("\n", "↵")


def _legend(figure: Figure, first: Positions, students: Mapping[str, Positions]) -> None:
    entries: list[Patch | Line2D] = [
        Patch(facecolor=COLOURS[label], hatch=HATCHES[label], ec="white", label=_told(label))
        for label in LABELS
        if label in first.label
    ]
    entries.append(Patch(facecolor="#cccccc", label="teacher's entropy"))
    entries += [
        Line2D([], [], color=colour, marker=mark, ls=dash, lw=1.2, label=name)
        for name, (colour, dash, mark) in group_looks(list(students)).items()
    ]
    figure.legend(
        handles=entries, loc="outside upper center", ncols=len(entries), frameon=False, fontsize=9,
        labelcolor=GREY,
    )  # fmt: skip


def _told(label: str) -> str:
    return {
        RIGHT: "teacher, right target", WRONG: "wrong target", BEHIND: "behind a wrong one",
        UNKNOWN: "teacher",
    }[label]  # fmt: skip
