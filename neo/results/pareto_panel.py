"""Quality against cost: the rows that no other row beats in both, joined by a line."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from neo.results.metrics import Metric, quantity
from neo.results.summary import Summary, TableRow, summarize

FRONT, REST, REFERENCE = "#0072B2", "#9a9a9a", "black"
LABEL_INCHES = 0.19


def pareto_front(points: Sequence[tuple[float, float]], better: tuple[str, str]) -> list[int]:
    """Return the indices, by rising x, of the points that no other point beats.

    A point is beaten by one that is at least as good in both numbers and better in one.

    Args:
        points: The two numbers of each.
        better: The good end of each number, "higher" or "lower".
    """
    signs = [1.0 if end == "lower" else -1.0 for end in better]
    turned = [(signs[0] * x, signs[1] * y) for x, y in points]
    front: list[int] = []
    lowest = float("inf")
    for i in sorted(range(len(turned)), key=lambda i: turned[i]):
        x, y = turned[i]
        if y < lowest or (front and turned[front[-1]] == (x, y)):
            front.append(i)
            lowest = y
    return sorted(front, key=lambda i: points[i])


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return places near the wanted ones, in their order, at least `gap` apart, `low` to `high`.

    Where the room is too small for that, they are evenly closer.
    """
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    for k, i in enumerate(order):
        floor = low if k == 0 else places[order[k - 1]] + gap
        places[i] = max(wanted[i], floor)
    for k in reversed(range(len(order))):
        ceiling = high if k == len(order) - 1 else places[order[k + 1]] - gap
        places[order[k]] = min(places[order[k]], ceiling)
    return places


def draw_pareto(
    axes: Axes,
    x: str,
    y: str,
    own: Sequence[TableRow],
    references: Sequence[TableRow],
    inches: float,
    *,
    log: bool = False,
) -> list[str]:
    """Draw a point per row at its means, each labelled in the margin, and return notes.

    Args:
        axes: To draw on.
        x: A metric or record field with a better end.
        y: Another.
        own: Rows that compete.
        references: Rows that are shown beside them, and neither beat nor are beaten.
        inches: Height of the axes, roughly.
        log: Both axes are logarithmic; rows without a number above 0 are left out.
    """
    infos = (quantity(x)[0], quantity(y)[0])
    own_points = _points(own, x, y, infos, positive=log)
    front = pareto_front(
        [point for _, point, _ in own_points], (infos[0].better or "", infos[1].better or "")
    )
    shown = [
        (label, point, stds, FRONT if i in front else REST)
        for i, (label, point, stds) in enumerate(own_points)
    ]
    shown += [(*point, REFERENCE) for point in _points(references, x, y, infos, positive=log)]
    for _, (across, up), (x_std, y_std), colour in shown:
        axes.errorbar(
            across,
            up,
            xerr=x_std,
            yerr=y_std,
            fmt="D" if colour == REFERENCE else "o",
            color=colour,
            ecolor="#dddddd",
            elinewidth=1.0,
            ms=7,
            ls="none",
            zorder=3 if colour == FRONT else 2,
        )
    # From one point to the next lies what the better of the two in y can be had for.
    axes.plot(
        [own_points[i][1][0] for i in front],
        [own_points[i][1][1] for i in front],
        color=FRONT,
        lw=1.8,
        drawstyle="steps-post" if infos[0].better == "lower" else "steps-pre",
        label="no other row is better in both means",
        zorder=2,
    )
    # Room around the means: a deviation that goes on beyond the edge is a wide one.
    if log and shown:
        axes.set_xscale("log")
        axes.set_yscale("log")
    for limit, numbers in (
        (axes.set_xlim, [p[0] for _, p, _, _ in shown]),
        (axes.set_ylim, [p[1] for _, p, _, _ in shown]),
    ):
        if log:
            room = (max(numbers) / min(numbers)) ** 0.1 * 1.2
            limit(min(numbers) / room, max(numbers) * room)
            continue
        room = 0.15 * (max(numbers) - min(numbers)) or 0.05 * abs(max(numbers)) or 1.0
        limit(min(numbers) - room, max(numbers) + room)
    for axis in (axes.xaxis, axes.yaxis) if log else ():
        low, high = axis.get_view_interval()
        axis.set_minor_formatter(NullFormatter())
        if high / low < 1000:  # few powers of ten, or none
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    for axis in () if log else (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        if axis.get_view_interval()[1] >= 10_000:
            axis.set_major_formatter(EngFormatter(sep=""))
    _label(axes, [(label, point, colour) for label, point, _, colour in shown], inches)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0.2, borderpad=0.1
    )
    missing = [
        row.spec.label
        for row in [*own, *references]
        if not _points([row], x, y, infos, positive=log)
    ]
    without = "without one of the two numbers" + " above 0" * log
    notes = [f"left out: {', '.join(missing)}, {without}"] if missing else []
    if any(std for _, _, stds, _ in shown for std in stds):
        notes.insert(0, "crosses: one standard deviation over the seeds")
    return notes


def _points(
    rows: Sequence[TableRow], x: str, y: str, infos: tuple[Metric, Metric], *, positive: bool
) -> list[tuple[str, tuple[float, float], tuple[float, float]]]:
    """Return label, means and deviations, in printed units, of the rows that have both."""
    found = []
    for row in rows:
        across, up = summarize(row.runs, x), summarize(row.runs, y)
        if across.mean is None or up.mean is None:
            continue
        point = (infos[0].scale * across.mean, infos[1].scale * up.mean)
        if positive and min(point) <= 0:
            continue
        found.append((row.spec.label, point, (_std(across, infos[0]), _std(up, infos[1]))))
    return found


def _std(summary: Summary, info: Metric) -> float:
    return info.scale * (summary.std or 0.0)


def _label(
    axes: Axes, points: Sequence[tuple[str, tuple[float, float], str]], inches: float
) -> None:
    """Write the labels in one column beside the axes, a thin line from each to its point."""
    low, high = axes.get_ylim()
    # Points at one height are told apart by the line: the right one's comes from above.
    order = sorted(points, key=lambda p: (p[1][1], p[1][0]))
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform(point)[1]) for _, point, _ in order]
    places = spread(wanted, LABEL_INCHES / inches, 0.02, 0.98)
    for (label, point, colour), place in zip(order, places, strict=True):
        axes.annotate(
            label,
            xy=point,
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9.5,
            color="#555555" if colour == REST else colour,
            weight="bold" if colour == FRONT else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": "#aaaaaa",
                "lw": 0.7,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
            zorder=1,
        )
    axes.set_ylim(low, high)
