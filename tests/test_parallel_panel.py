import itertools
import math

import pytest
from example_grid import KD, grid, run_at
from matplotlib.figure import Figure

from neo.results.keyed_runs import keyed_runs
from neo.results.looks import GREY
from neo.results.metrics import metric_info
from neo.results.parallel_panel import draw_parallel
from neo.results.shades import colours

KEYS = ["lora", "lora.r"]


def drawn(runs, keys=KEYS, name=KD):
    axes = Figure().subplots()
    found = keyed_runs(runs, keys, name)
    return axes, draw_parallel(axes, found, [*keys, name], metric_info(name), "kd")


def polylines(axes, style="-"):
    """The lines of runs as lists of heights; the axes are lines of two points."""
    return [
        [float(y) for y in line.get_ydata()]
        for line in axes.get_lines()
        if line.get_linestyle() == style
        and len(line.get_xdata()) > 1
        and line.get_xdata()[0] != line.get_xdata()[1]
    ]


def test_a_run_is_a_line_through_its_values_to_its_number():
    runs = grid({("lora", 4): [0.2], ("dora", 16): [0.5], ("pissa", 64): [0.6]})
    axes, _ = drawn(runs)
    middle = math.log(16 / 4) / math.log(64 / 4)
    assert sorted(polylines(axes)) == [
        [0.0, 0.0, 0.0],
        [0.5, pytest.approx(middle), pytest.approx(0.75)],
        [1.0, 1.0, 1.0],
    ]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["lora", "lora.r", KD]
    assert axes.get_ylim() == (0, 1)  # as the colour bar beside it, which is the last axis
    written = {(text.xy[0], text.get_text()) for text in axes.texts}
    assert written == {(0, "lora"), (0, "dora"), (0, "pissa"), (1, "4"), (1, "16"), (1, "64")}


@pytest.mark.parametrize(("name", "best"), [(KD, 0), ("val/agreement", 2)])
def test_a_line_has_the_colour_of_its_number_and_the_best_is_thick_and_on_top(name, best):
    runs = [
        run_at("lora", r, metrics={name: number}) for r, number in ((4, 0.2), (8, 0.5), (16, 0.6))
    ]
    axes, notes = drawn(runs, name=name)
    shown = [line for line in axes.get_lines() if len(line.get_xdata()) == 3]
    palette = colours(metric_info(name).better)
    for line in shown:
        assert line.get_color() == pytest.approx(palette(float(line.get_ydata()[-1])))
    assert shown[-1].get_linewidth() > max(line.get_linewidth() for line in shown[:-1])
    assert notes[0].startswith(f"thick: the best run, {['0.2000', '', '60.0'][best]} (lora, ")


def test_runs_that_did_not_finish_are_dashed_to_their_last_key_and_counted():
    runs = grid({("lora", 4): [0.2], ("dora", 16): [0.5]})
    runs += [run_at("lora", 16, 0, status="oom"), run_at("dora", 4, 1, status="diverged")]
    axes, _ = drawn(runs)
    assert sorted(polylines(axes, "--")) == [[0.0, 1.0], [1.0, 0.0]]
    assert {line.get_color() for line in axes.get_lines() if line.get_linestyle() == "--"} == {GREY}
    (text,) = axes.get_legend().get_texts()
    assert text.get_text() == "not finished: 1 diverged, 1 oom"
    assert len(polylines(axes)) == 2
    assert drawn(grid({("lora", 4): [0.2]}))[0].get_legend() is None


def test_a_run_beyond_the_range_ends_at_its_edge_and_is_counted():
    usual = [0.40, 0.41, 0.42, 0.43, 0.41, 0.42, 0.40, 0.44]
    axes, notes = drawn(grid({("lora", 4): usual, ("lora", 8): [9.0]}))
    assert [line[-1] for line in polylines(axes)].count(1.0) == 2  # 0.44 and 9.0
    assert any("1 runs lie beyond" in note or "1 run lies beyond" in note for note in notes)


def test_close_values_are_not_written_over_one_another():
    runs = grid({("lora", r): [0.2] for r in (100, 101, 102, 200)})
    axes, _ = drawn(runs)
    assert [text.get_text() for text in axes.texts if text.xy[0] == 1] == ["100", "102", "200"] or [
        text.get_text() for text in axes.texts if text.xy[0] == 1
    ] == ["100", "200"]
    heights = sorted(text.xy[1] for text in axes.texts if text.xy[0] == 1)
    assert all(b - a >= 0.045 for a, b in itertools.pairwise(heights))


def test_long_names_stand_on_two_lines_in_turn():
    key = "data.a_long_name_of_a_key"
    runs = [run_at("lora", 4, config={"data": {"a_long_name_of_a_key": i}}) for i in (1, 2)]
    runs = [run_at("lora", 4, i, 0.5, config=run.config) for i, run in enumerate(runs)]
    axes, _ = drawn(runs, ["lora", key])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["lora", key, KD]
    axes = Figure().subplots()
    names = [key * 2, key * 2, key * 2]
    draw_parallel(axes, keyed_runs(runs, ["lora", key], KD), names, metric_info(KD), "kd")
    assert [t.get_text().count("\n") for t in axes.get_xticklabels()] == [0, 1, 0]
