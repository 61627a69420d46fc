"""The panels drawn per row of the table: bars, scatter and seeds."""

import fnmatch
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.ticker import EngFormatter, MaxNLocator

from neo.results.looks import COLOURS, REFERENCE_LINES
from neo.results.metrics import quantity
from neo.results.summary import TableRow, by_seed, summarize

Styles = Mapping[str, tuple[str, str]]  # of a row's label: colour and hatch


def draw_bars(
    axes: Axes,
    names: list[str],
    own: list[TableRow],
    references: list[TableRow],
    styles: Styles,
) -> None:
    """Draw one cluster of bars per metric, a bar per row, and a line per reference row."""
    info = quantity(names[0])[0]
    width = 0.84 / len(own)
    for i, row in enumerate(own):
        colour, hatch = styles[row.spec.label]
        shown = [summarize(row.runs, name) for name in names]
        # A number that is missing has no bar, which differs from a bar of height 0.
        places = [k for k, summary in enumerate(shown) if summary.mean is not None]
        bars: BarContainer = axes.bar(
            [k - 0.42 + width * (i + 0.5) for k in places],
            [info.scale * (shown[k].mean or 0.0) for k in places],
            width,
            label=row.spec.label,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.6,
        )
        for bar, k in zip(bars, places, strict=True):
            if shown[k].std is not None:
                middle = bar.get_x() + bar.get_width() / 2
                std = info.scale * (shown[k].std or 0.0)
                axes.errorbar(middle, bar.get_height(), std, color="#333333", lw=1.1, capsize=1.8)
    for row, dash in zip(references, REFERENCE_LINES * len(references), strict=False):
        for k, name in enumerate(names):
            mean = summarize(row.runs, name).mean
            if mean is not None:
                axes.hlines(
                    info.scale * mean,
                    k - 0.46,
                    k + 0.46,
                    color="black",
                    ls=dash,
                    lw=1.5,
                    label="" if k else row.spec.label,  # one entry in the legend
                )
    axes.set_xticks(range(len(names)), [_kind_label(name) for name in names])
    if len(names) > 6:
        axes.tick_params(axis="x", rotation=30)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(names) - 0.4)
    if info.printed_unit == "%":
        axes.set_ylim(0, 100)
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    for k, name in enumerate(names):
        if name.startswith("eval/") and name.count("/") == 2:  # the whole task beside its kinds
            axes.axvspan(k - 0.5, k + 0.5, color="#f1f1f1", zorder=-2, lw=0)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(own) + len(references),
        frameon=False,
        borderaxespad=0.2,
        borderpad=0.1,
        handlelength=1.8,
        columnspacing=1.4,
    )


def draw_scatter(
    axes: Axes,
    x: str,
    y: str,
    rows: Sequence[TableRow],
    colours: Mapping[str, str],
) -> None:
    """Draw one point per row, with the standard deviations as a cross."""
    (x_info, _), (y_info, _) = quantity(x), quantity(y)
    for row in rows:
        across, up = summarize(row.runs, x), summarize(row.runs, y)
        if across.mean is None or up.mean is None:
            continue
        point = (x_info.scale * across.mean, y_info.scale * up.mean)
        axes.errorbar(
            *point,
            xerr=x_info.scale * (across.std or 0.0),
            yerr=y_info.scale * (up.std or 0.0),
            label=row.spec.label,
            fmt="D" if row.spec.reference else "o",
            color="black" if row.spec.reference else colours[row.spec.label],
            ms=7,
            capsize=3,
            ls="none",
        )
    axes.margins(0.15)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        if axis.get_data_interval()[1] >= 10_000:
            axis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=True, edgecolor="none")


def draw_seeds(axes: Axes, name: str, rows: Sequence[TableRow], baseline: str = "") -> None:
    """Draw one line per row with a dot per seed and a mark at the mean, the best mean on top.

    The mean of the row labelled `baseline` goes through all lines. Rows without a number are left
    out. Where neither end is the better one, the highest mean is on top.
    """
    info = quantity(name)[0]
    found = {row.spec.label: list(by_seed(row.runs, name).values()) for row in rows}
    shown = [(statistics.fmean(numbers), label) for label, numbers in found.items() if numbers]
    shown.sort(reverse=info.better == "lower")  # the axis begins at the bottom
    for is_base, colour in ((False, COLOURS[2]), (True, COLOURS[3])):
        dots = [
            # Seeds with the same number stand above one another: every seed is to be seen.
            (info.scale * number, height + 0.12 * found[label][:k].count(number))
            for height, (_, label) in enumerate(shown)
            for k, number in enumerate(found[label])
            if (label == baseline) == is_base
        ]
        axes.scatter(
            [x for x, _ in dots],
            [y for _, y in dots],
            s=50,
            color=colour,
            alpha=0.5,
            lw=0,
            clip_on=False,
            label="" if is_base else "seed",
        )
    means = [info.scale * mean for mean, _ in shown]
    axes.plot(means, range(len(means)), "|", color="black", ms=15, mew=2.2, label="mean")
    for mean, (_, label) in zip(means, shown, strict=True):
        if label == baseline:
            axes.axvline(
                mean, color=COLOURS[3], ls="--", lw=1.4, zorder=1, label=f"mean of {label}"
            )
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
        borderaxespad=0.2,
        borderpad=0.1,
        handlelength=1.4,
        columnspacing=1.4,
    )
    axes.set_yticks(range(len(shown)), [label for _, label in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="both", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)


def expand(names: Sequence[str], rows: Sequence[TableRow]) -> list[str]:
    """Return the metrics meant by `names`, where `/*` stands for every kind that is recorded."""
    recorded = sorted({name for row in rows for run in row.runs for name in run.metrics})
    expanded: list[str] = []
    for name in names:
        expanded += fnmatch.filter(recorded, name) if name.endswith("/*") else [name]
    return expanded


def _kind_label(name: str) -> str:
    parts = name.split("/")
    if parts[0] != "eval":
        return name
    return parts[3].replace("_", " ") if len(parts) > 3 else "all"
