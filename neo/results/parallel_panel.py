"""Parallel coordinates: a line per run through its values of several keys to its number."""

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes

from neo.results.key_cells import key_scales
from neo.results.keyed_runs import KeyedRun, KeyedRuns
from neo.results.looks import GREY
from neo.results.metrics import Metric
from neo.results.printing import number
from neo.results.scales import INCHES_PER_CHARACTER, KeyScale
from neo.results.shades import colour_bar, colours, number_scale

INCHES = 8.0  # width of the axes, roughly


def draw_parallel(
    axes: Axes, runs: KeyedRuns, names: Sequence[str], info: Metric, unit_text: str
) -> list[str]:
    """Draw a line per run, coloured by its number, the best on top; return notes.

    Args:
        axes: To draw on.
        runs: With the values of the keys.
        names: What stands under each axis: the keys, and then the number.
        info: What the number is.
        unit_text: Beside the colour bar, which is the scale of the last axis.
    """
    scales = key_scales(runs)
    last = len(scales)
    for x in range(last + 1):
        axes.axvline(x, color="#999999", lw=1, zorder=1)
    for keyed in runs.failed:
        heights = _heights(keyed, scales)
        axes.plot(range(last), heights, color=GREY, ls="--", lw=1.2, zorder=4)
        axes.plot(last - 1, heights[-1], "x", color=GREY, ms=7, mew=1.6, zorder=4)
    notes = []
    if runs.finished:
        shown = number_scale([keyed.number for keyed in runs.finished], info.better)
        norm, palette = shown.norm(), colours(info.better)
        best_last = sorted(runs.finished, key=lambda k: k.number, reverse=info.better != "higher")
        for keyed in best_last:
            heights = _heights(keyed, scales)
            height = float(norm(keyed.number))
            axes.plot(
                range(last + 1),
                [*heights, height],
                color=palette(height),
                lw=1.5,
                alpha=0.85,
                zorder=3,
            )
        if info.better is not None:
            axes.get_lines()[-1].set(lw=4, alpha=1.0)
            best = best_last[-1]
            values = ", ".join(
                scale.labels[scale.index(v)] for scale, v in zip(scales, best.values, strict=True)
            )
            text = number(best.number or 0.0, info.decimals)
            notes.append(f"thick: the best run, {text} ({values}, seed {best.run.seed})")
        colour_bar(axes, shown, info, unit_text)
        if beyond := shown.num_below + shown.num_above:
            number_of_runs = "1 run lies" if beyond == 1 else f"{beyond} runs lie"
            notes.append(f"{number_of_runs} beyond the last axis and end at its edge")
    for x, scale in enumerate(scales):
        _write_values(axes, x, scale)
    room = INCHES / (last + 1)
    tight = any(
        len(left) + len(right) > 2 * room / INCHES_PER_CHARACTER for left, right in pairwise(names)
    )
    # Where neighbours would touch, every second name stands a line lower.
    axes.set_xticks(
        range(last + 1), [("\n" if tight and x % 2 else "") + name for x, name in enumerate(names)]
    )
    axes.get_xticklabels()[-1].set_horizontalalignment("right")  # the colour bar is next to it
    axes.tick_params(axis="x", length=0, pad=7)
    axes.set_yticks([])
    axes.set_xlim(-0.25, last)
    axes.set_ylim(0, 1)
    axes.spines[:].set_visible(False)
    if runs.failed:
        axes.plot([], [], color=GREY, ls="--", marker="x", lw=1.3, label=runs.not_finished)
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1, 1.03),
            frameon=False,
            borderaxespad=0.2,
            borderpad=0,
        )
    return notes


def _heights(keyed: KeyedRun, scales: Sequence[KeyScale]) -> list[float]:
    """Return how high on each key's axis the run's value lies, 0 to 1."""
    return [
        scale.shares[scale.index(value)] for scale, value in zip(scales, keyed.values, strict=True)
    ]


def _write_values(axes: Axes, x: int, scale: KeyScale) -> None:
    """Write the values beside their axis, those left out that would touch the one below."""
    places, labels = scale.ticks()
    end = -1.0
    for label, share in zip(labels, scale.between(places), strict=True):
        if share - end < 0.045:
            continue
        end = share
        axes.annotate(
            label,
            (x, share),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            zorder=5,
            bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.8},
            annotation_clip=False,
        )
