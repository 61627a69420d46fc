from itertools import pairwise

import pytest
from example_runs import example_run
from matplotlib.figure import Figure

from neo.results.looks import COLOURS
from neo.results.panels import draw_bars, draw_scatter, draw_seeds, expand
from neo.results.row_spec import RowSpec
from neo.results.summary import TableRow

TASK = "eval/mini/exact_match"
STYLES = {"neo": (COLOURS[0], ""), "sft": (COLOURS[1], "")}


def row(method, *metrics, **changes):
    spec = RowSpec(label=method, where={"method": [method]})
    return TableRow(
        spec, [example_run(method, i, metrics=m, **changes) for i, m in enumerate(metrics)]
    )


@pytest.fixture
def axes():
    return Figure().subplots()


def test_bars_are_as_high_as_the_means_in_percent(axes):
    rows = [row("neo", {TASK: 0.2}, {TASK: 0.4}), row("sft", {TASK: 0.5})]
    draw_bars(axes, [TASK], rows, [], STYLES)
    assert [bar.get_height() for bar in axes.patches[:2]] == pytest.approx([30.0, 50.0])
    assert axes.get_ylim() == (0, 100)


def test_a_missing_number_has_no_bar_and_zero_has_one(axes):
    names = [f"{TASK}/dates", f"{TASK}/logic"]
    draw_bars(axes, names, [row("neo", {names[0]: 0.0})], [], STYLES)
    assert [bar.get_height() for bar in axes.patches] == [0.0]


def test_bars_do_not_overlap(axes):
    names = [f"{TASK}/{kind}" for kind in "abc"]
    rows = [row(label, dict.fromkeys(names, 0.5)) for label in STYLES]
    draw_bars(axes, names, rows, [], STYLES)
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(spans))


def test_the_legend_names_every_row_once_references_too(axes):
    names = [TASK, f"{TASK}/dates"]
    metrics = dict.fromkeys(names, 0.5)
    draw_bars(
        axes, names, [row("neo", metrics), row("sft", metrics)], [row("teacher", metrics)], STYLES
    )
    assert sorted(t.get_text() for t in axes.get_legend().get_texts()) == ["neo", "sft", "teacher"]


def test_a_star_stands_for_every_recorded_kind_and_for_nothing_else():
    rows = [row("neo", {f"{TASK}/b": 1.0, "eval/mini/acc/c": 1.0}, {f"{TASK}/a": 1.0, TASK: 1.0})]
    assert expand([TASK, f"{TASK}/*"], rows) == [TASK, f"{TASK}/a", f"{TASK}/b"]


def test_a_scatter_point_stands_at_both_means(axes):
    rows = [row("neo", {TASK: 0.25}, {TASK: 0.75}, seconds=10.0), row("sft", {}, seconds=1.0)]
    draw_scatter(axes, "seconds", TASK, rows, {"neo": COLOURS[0], "sft": COLOURS[1]})
    points = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "o"]
    assert points == [[[10.0, 50.0]]]


def dots(axes):
    return sorted(tuple(p) for marks in axes.collections for p in marks.get_offsets().tolist())


def labels(axes):
    """The rows' labels from the top."""
    return [tick.get_text() for tick in axes.get_yticklabels()][::-1]


def test_seeds_are_all_there_on_the_line_of_their_row_with_the_mean_marked(axes):
    rows = [row("neo", {TASK: 0.2}, {TASK: 0.4}), row("sft", {TASK: 0.5}), row("kd", {})]
    draw_seeds(axes, TASK, rows)
    assert labels(axes) == ["sft", "neo"]
    assert dots(axes) == [(20.0, 0.0), (40.0, 0.0), (50.0, 1.0)]
    (means,) = axes.get_lines()
    assert means.get_xydata().tolist() == [[pytest.approx(30.0), 0.0], [50.0, 1.0]]


@pytest.mark.parametrize(("name", "top"), [(TASK, "sft"), ("val/kd", "neo"), ("train/lr", "sft")])
def test_the_best_mean_is_on_top(axes, name, top):
    draw_seeds(axes, name, [row("neo", {name: 0.1}), row("sft", {name: 0.2})])
    assert labels(axes)[0] == top


def test_seeds_with_the_same_number_do_not_hide_each_other(axes):
    draw_seeds(axes, TASK, [row("neo", {TASK: 0.5}, {TASK: 0.5}, {TASK: 0.5})])
    assert len(set(dots(axes))) == 3
    assert {x for x, _ in dots(axes)} == {50.0}
    assert all(abs(y) < 0.5 for _, y in dots(axes))  # still on its own line


def test_the_baselines_mean_runs_through_all_lines_and_without_one_there_is_none(axes):
    rows = [row("neo", {TASK: 0.2}, {TASK: 0.4}), row("sft", {TASK: 0.5})]
    draw_seeds(axes, TASK, rows, "neo")
    (line,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert list(line.get_xdata()) == pytest.approx([30.0, 30.0])
    assert list(line.get_ydata()) == [0, 1]  # of the axes' height
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["seed", "mean", "mean of neo"]
