import statistics

import numpy
import pytest
from example_runs import example_run
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from neo.results.curves import draw_curves, group_curves, mean_curve, over_tokens, read_curve

LOOKS = {"neo": ("#0072B2", "-"), "sft": ("#E69F00", "--")}
CURVES = st.lists(
    st.dictionaries(st.integers(0, 30).map(float), st.floats(-5, 5), min_size=1, max_size=8),
    min_size=1,
    max_size=4,
)


@pytest.fixture
def axes():
    return Figure().subplots()


def log_of(folder, **texts):
    paths = {}
    for run_id, text in texts.items():
        paths[run_id] = folder / run_id
        paths[run_id].write_text(text)
    return paths


def test_a_curve_holds_the_logged_steps_only(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,val/kd\n0,1,\n0,2,0.5\n0,3,nan\n0,4,0.25\n")
    assert read_curve(path, "val/kd") == [(2.0, 0.5), (4.0, 0.25)]
    assert read_curve(path, "val/ce") == []


def test_a_log_with_a_word_for_a_number_is_refused_naming_file_and_column(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,val/kd\n1,low\n")
    with pytest.raises(ValueError, match=r"metrics\.csv: column 'val/kd'.*low"):
        read_curve(path, "val/kd")


def test_over_tokens_a_value_stands_at_the_tokens_seen_at_its_step():
    counts = [(1.0, 20.0), (3.0, 60.0)]
    curve = [(0.0, 9.0), (1.0, 8.0), (2.0, 7.0), (3.0, 6.0), (4.0, 5.0)]
    # Step 0 lies halfway from none at step -1; step 4 goes on at the mean of 15 tokens a step.
    assert over_tokens(curve, counts) == [(10, 9.0), (20, 8.0), (40, 7.0), (60, 6.0), (75, 5.0)]
    assert over_tokens(curve, []) == []


@given(CURVES)
def test_over_steps_the_mean_stands_where_all_curves_have_a_value(tables):
    found = mean_curve([sorted(table.items()) for table in tables], same_x=True)
    shared = sorted(x for x in tables[0] if all(x in table for table in tables))
    if not shared:
        assert found is None
        return
    assert found.x == shared
    assert found.mean == pytest.approx([statistics.fmean(t[x] for t in tables) for x in shared])
    if len(tables) > 1:
        assert found.std == pytest.approx([statistics.stdev(t[x] for t in tables) for x in shared])
    else:
        assert found.std is None


@given(CURVES)
def test_over_tokens_the_mean_is_that_of_the_lines_between_the_points(tables):
    curves = [sorted(table.items()) for table in tables]
    found = mean_curve(curves, same_x=False)
    start, end = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    inside = sorted({x for table in tables for x in table if start <= x <= end})
    if not inside:
        assert found is None
        return
    assert found.x == inside
    lines = [numpy.interp(inside, *zip(*curve, strict=True)) for curve in curves]
    assert found.mean == pytest.approx(numpy.mean(lines, axis=0).tolist(), abs=1e-9)


def test_runs_without_a_log_or_a_column_are_counted_and_a_resumed_step_counts_once(tmp_path):
    logs = log_of(
        tmp_path,
        neo0="step,train/tokens,val/kd\n1,10,2.0\n0,5,4.0\n1,10,1.0\n",
        neo1="step,train/tokens\n1,10\n",
        neo2="step,val/kd\n1,2.0\n",
    )
    runs = [example_run("neo", i) for i in range(4)]
    curves, lacking = group_curves(runs, "val/kd", "step", logs)
    assert curves == [[(0.0, 4.0), (1.0, 1.0)], [(1.0, 2.0)]]
    assert lacking == {"a log": 1, "val/kd": 1}
    curves, lacking = group_curves(runs, "val/kd", "tokens", logs)
    assert curves == [[(5.0, 4.0), (10.0, 1.0)]]
    assert lacking == {"a log": 1, "val/kd": 1, "train/tokens": 1}


def test_a_group_is_its_mean_in_the_printed_unit_with_one_deviation_around_it(axes):
    groups = {
        "neo": [[(1.0, 0.1), (2.0, 0.2), (3.0, 0.9)], [(1.0, 0.3), (2.0, 0.4)]],
        "sft": [[(1.0, 0.5)]],
    }
    assert draw_curves(axes, "val/agreement", "step", groups, LOOKS, "method") == []
    neo, sft = axes.get_lines()
    assert neo.get_xydata().tolist() == [[1.0, pytest.approx(20.0)], [2.0, pytest.approx(30.0)]]
    assert sft.get_xydata().tolist() == [[1.0, 50.0]]
    assert (neo.get_color(), sft.get_linestyle()) == ("#0072B2", "--")
    (band,) = axes.collections  # a single run has none
    heights = {round(y, 6) for x, y in band.get_paths()[0].vertices if x == 1.0}
    std = 100 * statistics.stdev([0.1, 0.3])
    assert heights == {round(20 - std, 6), round(20 + std, 6)}
    assert axes.get_legend().get_title().get_text() == "method"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["neo", "sft"]


def test_a_group_whose_runs_share_no_step_is_named(axes):
    groups = {"neo": [[(1.0, 0.1)], [(2.0, 0.3)]], "sft": []}
    notes = draw_curves(axes, "val/kd", "step", groups, LOOKS)
    assert notes == ["left out: neo, whose runs have no step in common"]
    assert axes.get_lines()[:] == []
