import statistics

import pytest
from example_grid import KD, grid, run_at
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from neo.results.heatmap_panel import FRAME, cell_lines, draw_heatmap
from neo.results.keyed_runs import keyed_runs
from neo.results.metrics import metric_info
from neo.results.shades import colours

KEYS = ["lora.r", "lora"]


def drawn(runs, keys=KEYS, name=KD):
    axes = Figure().subplots()
    notes = draw_heatmap(axes, keyed_runs(runs, keys, name), keys, metric_info(name), 8.0, "kd")
    return axes, notes


def texts(axes):
    """Labels of column and row to the lines in the cell."""
    columns = [tick.get_text() for tick in axes.get_xticklabels()]
    rows = [tick.get_text() for tick in axes.get_yticklabels()]
    return {
        (columns[round(x)], rows[round(y)]): text.get_text().split("\n")
        for text in axes.texts
        for x, y in [text.get_position()]
    }


def frames(axes):
    return [
        (p.get_x() + 0.5, p.get_y() + 0.5)
        for p in axes.patches
        if to_hex(p.get_edgecolor()) == FRAME.lower()
    ]


@settings(deadline=None, max_examples=20)  # a figure each
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["lora", "dora", "pissa"]), st.sampled_from([4, 8, 64])),
        st.lists(st.floats(0.2, 0.9), min_size=1, max_size=3),
        min_size=1,
    )
)
def test_a_cell_prints_the_mean_and_the_runs_where_they_differ_and_the_best_is_framed(numbers):
    axes, _ = drawn(grid(numbers))
    same = len({len(found) for found in numbers.values()}) == 1
    shown = texts(axes)
    assert set(shown) == {(str(r), lora) for lora, r in numbers}
    means = {at: statistics.fmean(found) for at, found in numbers.items()}
    for (lora, r), found in numbers.items():
        expected = [f"{means[lora, r]:.4f}"] + ([] if same else [f"n={len(found)}"])
        assert shown[str(r), lora] == expected
    (frame,) = frames(axes)
    columns = sorted({r for _, r in numbers})
    rows = [tick.get_text() for tick in axes.get_yticklabels()]
    assert means[rows[round(frame[1])], columns[round(frame[0])]] == min(means.values())


def test_the_higher_mean_is_framed_where_higher_is_better_and_none_where_neither_is():
    for name, frame in (("val/agreement", [(1.0, 0.0)]), ("train/grad_norm", [])):
        runs = [run_at("lora", r, metrics={name: n}) for r, n in ((4, 0.2), (8, 0.6))]
        axes, notes = drawn(runs, name=name)
        assert frames(axes) == frame
        assert any("framed" in note for note in notes) == bool(frame)


def test_cells_without_runs_are_empty_and_those_with_failed_runs_only_are_marked():
    runs = grid({("lora", 4): [0.5], ("dora", 8): [0.4]})
    runs += [run_at("lora", 8, s, status="oom") for s in range(2)]
    runs.append(run_at("lora", 4, 1, status="diverged"))
    axes, notes = drawn(runs)
    assert texts(axes) == {
        ("4", "lora"): ["0.5000", "✕ 1"],
        ("8", "dora"): ["0.4000"],
        ("8", "lora"): ["✕ 2"],
    }
    filled = {(p.get_x() + 0.5, p.get_y() + 0.5): to_hex(p.get_facecolor()) for p in axes.patches}
    assert (0.0, 1.0) not in filled  # dora at 4
    assert filled[1.0, 0.0] == "#e4e4e4"
    assert "✕ not finished: 1 diverged, 2 oom" in notes
    assert "white: not run" in notes
    whole, notes = drawn(grid({("lora", 4): [0.5]}))
    assert "white: not run" not in notes
    assert len(whole.patches) == 2


def test_colours_are_those_of_the_colour_bar_and_text_is_seen_on_them():
    axes, _ = drawn(grid({("lora", 4): [0.2], ("lora", 8): [0.5], ("lora", 16): [0.6]}))
    palette = colours("lower")
    cells = sorted(axes.patches[:3], key=lambda p: p.get_x())
    assert [p.get_facecolor() for p in cells] == [
        pytest.approx(palette(share)) for share in (0.0, 0.75, 1.0)
    ]
    inks = [t.get_color() for t in sorted(axes.texts, key=lambda t: t.get_position())]
    assert (inks[0], inks[2]) == ("white", "black")


def test_numbers_grow_upwards_and_categories_are_read_from_the_top():
    runs = grid({("lora", 4): [0.5], ("dora", 8): [0.4]})
    axes, _ = drawn(runs, ["lora.r", "lora"])
    assert axes.yaxis_inverted()
    axes, _ = drawn(runs, ["lora", "lora.r"])
    assert not axes.yaxis_inverted()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["4", "8"]
    assert axes.get_ylim() == (-0.5, 1.5)


def test_a_key_with_too_many_values_for_cells_is_refused_naming_it():
    drawn(grid({("lora", r): [0.5] for r in range(30)}))
    with pytest.raises(ValueError, match=r"heatmap over 'lora\.r' has 31 .*at most 30; a sweep"):
        drawn(grid({("lora", r): [0.5] for r in range(31)}))


def test_the_height_of_a_cell_is_that_of_its_lines():
    runs = grid({("lora", 4): [0.5], ("lora", 8): [0.5]})
    failed = [run_at("lora", 4, 7, status="oom")]
    more = grid({("lora", 4): [0.5], ("lora", 8): [0.5, 0.4]})
    assert [cell_lines(keyed_runs(r, KEYS, KD)) for r in (runs, more, runs + failed)] == [1, 2, 2]
    assert cell_lines(keyed_runs(more + failed, KEYS, KD)) == 3
