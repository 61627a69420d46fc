import io

import matplotlib.image
import pytest
from example_runs import example_run

from neo.results.figures import draw_figure
from neo.results.table_spec import ColumnSpec, PanelSpec, RowSpec, TableSpec
from neo.results.tables import build_table

BARS = PanelSpec(kind="bars", x=["eval/mini/exact_match", "eval/mini/exact_match/*"])
CURVES = PanelSpec(kind="curves", x=["step"], y="val/kd")
SEEDS = PanelSpec(kind="seeds", x=["eval/mini/exact_match"])
SCATTER = PanelSpec(kind="scatter", x=["num_trainable_parameters"], y="eval/mini/exact_match")


def table_of(panels, methods=("sft", "neo"), groups=("",), **changes):
    column = ColumnSpec(
        key="val/kd", source="metric", label="kd", unit="", decimals=2, better=None, scale=1.0
    )
    rows = [
        RowSpec(label=m, group=group, where={"method": [m], "data": [group or "mini"]})
        for group in groups
        for m in methods
    ]
    teacher = RowSpec(label="teacher", reference=True, where={"method": ["teacher"]})
    records = [
        example_run(
            m,
            seed,
            run_id=f"{m}{seed}{group}",
            choices={"method": m, "data": group or "mini"},
            num_trainable_parameters=100_000,
            metrics={
                "eval/mini/exact_match": 0.4 + 0.1 * seed,
                "eval/mini/exact_match/dates": 0.3,
                "eval/mini/exact_match/two_step": 0.5,
            },
            **changes,
        )
        for group in groups
        for m in (*methods, "teacher")
        for seed in range(2)
    ]
    spec = TableSpec(title="T", rows=[teacher, *rows], columns=[column], figures=panels)
    if len(groups) > 1:  # one teacher is enough
        records = [r for r in records if r.choices["method"] != "teacher"]
    return build_table(spec, records)


def size(png):
    return matplotlib.image.imread(io.BytesIO(png), format="png").shape[:2]


@pytest.fixture
def curves(tmp_path):
    paths = {}
    for run_id in ("neo0", "neo1"):
        paths[run_id] = tmp_path / f"{run_id}.csv"
        paths[run_id].write_text("step,train/loss,val/kd\n1,3.0,\n2,,0.5\n4,,0.25\n")
    return paths


@pytest.mark.parametrize("panel", [BARS, SCATTER, SEEDS], ids=lambda p: p.kind)
def test_a_figure_drawn_twice_is_equal_to_the_byte(panel):
    assert draw_figure(table_of([panel]), {}) == draw_figure(table_of([panel]), {})


def test_every_panel_and_every_group_adds_to_the_figure(curves):
    one = size(draw_figure(table_of([BARS]), {}))
    two = size(draw_figure(table_of([BARS], groups=("clean", "noisy")), {}))
    three = size(draw_figure(table_of([BARS, CURVES, SCATTER]), curves))
    assert two == (2 * one[0], one[1])
    assert one[0] < three[0] < two[0]  # curves and scatter share a line


def test_a_panel_of_seeds_grows_with_its_rows_and_shares_its_line():
    few = size(draw_figure(table_of([SEEDS]), {}))
    many = size(draw_figure(table_of([SEEDS], methods="abcdefgh"), {}))
    assert many[0] > few[0]
    assert size(draw_figure(table_of([SEEDS, SEEDS]), {})) == few
    assert draw_figure(table_of([PanelSpec(kind="seeds", x=["val/kd"])]), {}) is None


def test_without_a_log_the_curves_are_left_out_and_nothing_left_is_no_figure(curves):
    assert draw_figure(table_of([CURVES]), {}) is None
    assert draw_figure(table_of([]), curves) is None
    assert draw_figure(table_of([BARS, CURVES]), {}) == draw_figure(table_of([BARS]), {})


def test_runs_that_did_not_finish_are_not_drawn():
    assert draw_figure(table_of([BARS], status="failed"), {}) is None


def test_the_readers_own_style_changes_nothing():
    expected = draw_figure(table_of([BARS]), {})
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert draw_figure(table_of([BARS]), {}) == expected
