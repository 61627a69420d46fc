import statistics

import pytest
from example_grid import KD, grid, run_at
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from neo.results.keyed_runs import keyed_runs
from neo.results.metrics import metric_info
from neo.results.sweep_panel import draw_sweep

LOSSES = st.lists(st.floats(0.2, 0.9), min_size=1, max_size=3)


def drawn(runs, keys, by="", name=KD):
    axes = Figure().subplots()
    found = keyed_runs(runs, keys, name)
    return axes, draw_sweep(axes, found, keys, metric_info(name), 8.0, by)


def lines(axes):
    """Label to the points of its line, and its deviations."""
    found = {}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, (bars,) = container
            # A single run has no deviation, so no bar.
            found[container.get_label()] = (
                [tuple(point) for point in line.get_xydata().tolist()],
                [float(s[1][1] - s[0][1]) / 2 for s in bars.get_segments() if len(s)],
            )
    return found


def dots(axes):
    return [tuple(p) for marks in axes.collections[:] for p in offsets(marks)]


def offsets(marks):
    return marks.get_offsets().tolist() if hasattr(marks, "get_sizes") else []


@settings(deadline=None, max_examples=20)  # a figure each
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["lora", "dora", "pissa"]), st.sampled_from([4, 8, 16, 64])),
        LOSSES,
        min_size=1,
    )
)
def test_lines_go_through_the_means_and_every_run_is_a_dot(numbers):
    axes, _ = drawn(grid(numbers), ["lora.r", "lora"], by="lora")
    expected = {}
    for (lora, r), found in sorted(numbers.items(), key=lambda item: item[0][1]):
        expected.setdefault(lora, []).append((r, statistics.fmean(found)))
    shown = lines(axes)
    assert {lora: points for lora, (points, _) in shown.items()} == {
        lora: [pytest.approx(point) for point in points] for lora, points in expected.items()
    }
    assert sorted(dots(axes)) == sorted(
        (float(r), number) for (_, r), found in numbers.items() for number in found
    )


def test_bars_are_one_standard_deviation_and_a_single_run_has_none():
    axes, notes = drawn(grid({("lora", 4): [0.3, 0.5], ("lora", 8): [0.4]}), ["lora.r"])
    ((_, deviations),) = lines(axes).values()
    assert [d for d in deviations if d == d] == [pytest.approx(statistics.stdev([0.3, 0.5]))]
    assert "bars: one standard deviation" in notes


@pytest.mark.parametrize(
    ("name", "best"),
    [(KD, (4.0, 0.2)), ("val/agreement", (16.0, 60.0)), ("train/grad_norm", None)],
)
def test_the_best_mean_is_circled_where_one_end_is_the_better(name, best):
    runs = [
        run_at("lora", r, metrics={name: number}) for r, number in ((4, 0.2), (8, 0.4), (16, 0.6))
    ]
    axes, notes = drawn(runs, ["lora.r"], name=name)
    rings = [tuple(ln.get_xydata()[0]) for ln in axes.get_lines() if ln.get_mfc() == "none"]
    assert rings == ([] if best is None else [pytest.approx(best)])
    assert any("circled: the best mean" in note for note in notes) == (best is not None)


def test_the_best_is_named_with_its_values():
    _, notes = drawn(grid({("lora", 4): [0.3], ("dora", 8): [0.2]}), ["lora.r", "lora"], by="lora")
    assert notes[0] == "circled: the best mean, 0.2000 (lora.r 8, lora dora)"


@pytest.mark.parametrize(("ranks", "scale"), [((4, 8, 16), "linear"), ((4, 16, 64), "log")])
def test_the_axis_is_logarithmic_where_the_values_span_a_decade(ranks, scale):
    axes, _ = drawn(grid({("lora", r): [0.5] for r in ranks}), ["lora.r"])
    assert axes.get_xscale() == scale
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(r) for r in ranks]


def test_categories_are_not_joined_and_groups_stand_beside_one_another():
    axes, _ = drawn(
        grid({("lora", 4): [0.5], ("dora", 4): [0.4], ("lora", 8): [0.5]}), ["lora", "lora.r"], "r"
    )
    assert {ln.get_linestyle() for ln in axes.get_lines()} == {"None"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["lora", "dora"]
    (four, _), (eight, _) = lines(axes).values()
    assert [round(x) for x, _ in four] == [0, 1]
    assert four[0][0] < 0 < eight[0][0]


def test_the_many_values_of_a_random_search_are_not_joined():
    few = grid({("lora", 0.001 * r): [0.5] for r in range(1, 13)})
    many = grid({("lora", 0.001 * r): [0.5] for r in range(1, 14)})
    assert drawn(few, ["lora.r"])[0].get_lines()[0].get_linestyle() == "-"
    assert drawn(many, ["lora.r"])[0].get_lines()[0].get_linestyle() == "None"


def test_runs_that_did_not_finish_are_counted_at_their_value_even_where_nothing_finished():
    runs = grid({("lora", 4): [0.5, 0.4]})
    runs += [run_at("lora", 64, s, status=end) for s, end in enumerate(("oom", "diverged", "oom"))]
    runs.append(run_at("dora", 4, status="failed"))
    axes, notes = drawn(runs, ["lora.r", "lora"], by="lora")
    assert {(text.get_position()[0], text.get_text()) for text in axes.texts} == {
        (64.0, "✕3"),
        (4.0, "✕"),
    }
    assert "✕ not finished: 1 diverged, 1 failed, 2 oom" in notes
    assert axes.get_xlim()[1] > 64
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["lora:", "lora", "dora"]


def test_a_run_that_diverged_leaves_the_others_room_and_is_counted_at_the_edge():
    numbers = [0.40, 0.41, 0.42, 0.43, 0.41, 0.42, 0.40, 0.44]
    axes, notes = drawn(grid({("lora", 4): numbers, ("lora", 8): [9.0, 8.0]}), ["lora.r"])
    low, high = axes.get_ylim()
    assert low < 0.40
    assert 0.44 < high < 0.6
    assert [(t.get_position()[0], t.get_text()) for t in axes.texts] == [(8.0, "▲2")]
    assert (8.0, 9.0) in dots(axes)  # there, beyond the edge
    assert "▲: so many runs lie beyond the edge" in notes


def test_a_mean_over_more_than_seeds_says_so():
    _, notes = drawn(grid({("lora", 4): [0.5], ("dora", 4): [0.4]}), ["lora.r"])
    assert notes[-1] == "means run over lora, too"
    _, notes = drawn(grid({("lora", 4): [0.5], ("dora", 4): [0.4]}), ["lora.r", "lora"], "lora")
    assert not any("means run over" in note for note in notes)


def test_few_groups_have_their_legend_above_and_many_beside_the_axes():
    few, _ = drawn(grid({(v, 4): [0.5] for v in "ab"}), ["lora.r", "lora"], "lora")
    many, _ = drawn(
        grid({(f"variant {v}", 4): [0.5] for v in range(13)}), ["lora.r", "lora"], "lora"
    )
    assert few.get_legend()._ncols == 3
    assert many.get_legend()._ncols == 1
    assert len(many.get_legend().get_texts()) == 13
