from itertools import pairwise

import pytest
from example_runs import example_run
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from neo.results.pareto_panel import FRONT, REFERENCE, REST, draw_pareto, pareto_front, spread
from neo.results.row_spec import RowSpec
from neo.results.summary import TableRow

TASK = "eval/mini/exact_match"
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=14)
ENDS = st.tuples(*[st.sampled_from(["lower", "higher"])] * 2)


def beats(one, other, better):
    """By the definition: at least as good in both and better in one."""
    ahead = [(a - b) * (1 if end == "higher" else -1) for a, b, end in zip(one, other, better)]  # noqa: B905
    return min(ahead) >= 0 and max(ahead) > 0


@given(POINTS, ENDS)
def test_the_front_is_what_no_other_point_beats(points, better):
    points = [(float(x), float(y)) for x, y in points]
    front = pareto_front(points, better)
    unbeaten = {
        i for i, point in enumerate(points) if not any(beats(o, point, better) for o in points)
    }
    assert set(front) == unbeaten
    assert len(front) == len(unbeaten)
    xs = [points[i][0] for i in front]
    assert xs == sorted(xs)


@given(st.lists(st.floats(0, 1), max_size=15), st.floats(0.01, 0.3))
def test_spread_labels_keep_their_order_their_distance_and_the_axes(wanted, gap):
    places = spread(wanted, gap, 0.0, 1.0)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    room = min(gap, 1 / (len(wanted) - 1)) if len(wanted) > 1 else gap
    assert all(places[b] - places[a] >= room - 1e-9 for a, b in pairwise(order))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)


def test_labels_with_room_stay_where_they_are_wanted():
    assert spread([0.9, 0.1, 0.5], 0.1, 0.0, 1.0) == [0.9, 0.1, 0.5]


def row(label, *pairs, reference=False):
    """One run per pair of seconds and exact match."""
    runs = [
        example_run(label, i, seconds=s, metrics={} if match is None else {TASK: match})
        for i, (s, match) in enumerate(pairs)
    ]
    return TableRow(RowSpec(label=label, where={"m": [label]}, reference=reference), runs)


ROWS = [
    row("cheap", (10.0, 0.25), (20.0, 0.5)),
    row("good", (60.0, 0.75)),
    row("poor", (50.0, 0.25)),
    row("lost", (5.0, None)),
]


@pytest.fixture
def axes():
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def points(axes):
    """Colour to the points that have it."""
    found = {}
    for line in axes.get_lines():
        if line.get_marker() in ("o", "D"):
            found.setdefault(line.get_color(), []).append(tuple(line.get_xydata()[0].tolist()))
    return found


def test_rows_stand_at_both_means_and_the_beaten_ones_are_pale(axes):
    teacher = row("teacher", (1.0, 1.0), reference=True)
    notes = draw_pareto(axes, "seconds", TASK, ROWS, [teacher], 3.0)
    assert points(axes) == {
        FRONT: [(15.0, 37.5), (60.0, 75.0)],
        REST: [(50.0, 25.0)],
        REFERENCE: [(1.0, 100.0)],  # beats all, and does not compete
    }
    assert any("lost, without one of the two numbers" in note for note in notes)


@pytest.mark.parametrize(
    ("x", "y", "style", "ends"),
    [
        ("seconds", TASK, "steps-post", [[15.0, 37.5], [60.0, 75.0]]),
        (TASK, "seconds", "steps-pre", [[37.5, 15.0], [75.0, 60.0]]),
    ],
)
def test_the_front_is_joined_by_steps_along_what_can_be_had(axes, x, y, style, ends):
    draw_pareto(axes, x, y, ROWS, [], 3.0)
    (front,) = [line for line in axes.get_lines() if line.get_drawstyle() != "default"]
    assert front.get_drawstyle() == style
    assert front.get_xydata().tolist() == ends


def test_with_logarithmic_axes_rows_need_numbers_above_0_and_labels_stand_at_their_points(axes):
    rows = [row("small", (1.0, 0.001)), row("large", (100.0, 1.0)), row("none", (10.0, 0.0))]
    notes = draw_pareto(axes, "seconds", TASK, rows, [], 3.0, log=True)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert any("none, without one of the two numbers above 0" in note for note in notes)
    low, high = sorted(text.xyann[1] for text in axes.texts)
    assert low < 0.4  # at its end, though it is a thousandth of the other
    assert high > 0.6


def test_every_point_has_one_label_beside_the_axes_and_none_overlaps(axes):
    crowd = [row(f"variant {i}", (30.0 + 0.01 * i, 0.5)) for i in range(13)]
    draw_pareto(axes, "seconds", TASK, crowd, [], axes.get_figure().get_figheight())
    figure = axes.get_figure()
    figure.canvas.draw()
    assert sorted(text.get_text() for text in axes.texts) == sorted(r.spec.label for r in crowd)
    # A Text's extent without the line that leads to its point.
    boxes = sorted(
        (super(type(text), text).get_window_extent() for text in axes.texts), key=lambda b: b.y0
    )
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))
    assert all(box.x0 > axes.get_window_extent().x1 for box in boxes)
    assert all(box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    for text in axes.texts:
        assert text.xy == (30.0 + 0.01 * int(text.get_text().split()[1]), 50.0)
