import io
from itertools import pairwise

import matplotlib.image
import pytest
from example_grid import KD, grid, run_at
from example_runs import example_run
from matplotlib.text import Text

from neo.results.figures import build_figure, draw_figure, draw_named
from neo.results.row_spec import RowSpec
from neo.results.table_spec import ColumnSpec, PanelSpec, TableSpec
from neo.results.tables import build_table

BARS = PanelSpec(kind="bars", x=["eval/mini/exact_match", "eval/mini/exact_match/*"])
CURVES = PanelSpec(kind="curves", x=["step"], y="val/kd")
SEEDS = PanelSpec(kind="seeds", x=["eval/mini/exact_match"])
SCATTER = PanelSpec(kind="scatter", x=["num_trainable_parameters"], y="eval/mini/exact_match")

PARETO = PanelSpec(kind="pareto", x=["seconds"], y=KD)
SWEEP = PanelSpec(kind="sweep", x=["lora.r"], y=KD, by="lora")
PARALLEL = PanelSpec(kind="parallel", x=["lora", "lora.r"], y=KD)
HEATMAP = PanelSpec(kind="heatmap", x=["lora.r"], y="lora", z=KD)
GROUPED = PanelSpec(kind="curves", x=["tokens"], y=KD, by="lora")
KEYED = [PARETO, SWEEP, PARALLEL, HEATMAP, GROUPED]


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


def kind_of(panel):
    return panel.kind


def grid_table(panels, more=(), variants=("lora", "dora"), groups=True):
    """A row per variant, each in a group of its own, and what did not finish besides."""
    numbers = {
        (v, r): [0.3 + 0.01 * i + 0.001 * r, 0.4] for i, v in enumerate(variants) for r in (4, 64)
    }
    records = [*grid(numbers), *more]
    records = [
        run_at(r.choices["lora"], r.config["lora"]["r"], r.seed, r.metrics.get(KD), status=r.status)
        if r in more
        else run_at(
            r.choices["lora"], r.config["lora"]["r"], r.seed, r.metrics[KD], seconds=9.0 + r.seed
        )
        for r in records
    ]
    rows = [
        RowSpec(label=f"{v} {r}", group=v if groups else "", where={"lora": [v], "lora.r": [r]})
        for v in variants
        for r in (4, 64)
    ]
    column = ColumnSpec(
        key=KD, source="metric", label="val kd", unit="", decimals=2, better="lower", scale=1.0
    )
    spec = TableSpec(title="T", rows=rows, columns=[column], figures=panels)
    return build_table(spec, records)


def logs_of(table, folder):
    logs = {}
    for run in table.runs:
        logs[run.run_id] = folder / run.run_id
        logs[run.run_id].write_text("step,train/tokens,val/kd\n0,50,0.9\n1,100,0.5\n")
    return logs


@pytest.mark.parametrize("panel", KEYED, ids=kind_of)
def test_a_panel_over_keys_is_drawn_once_and_one_of_rows_per_group(panel, tmp_path):
    table = grid_table([panel])
    figure = build_figure(table, [panel], logs_of(table, tmp_path))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert len(titles) == (2 if panel.kind == "pareto" else 1)
    assert draw_figure(table, logs_of(table, tmp_path)) == draw_figure(
        grid_table([panel]), logs_of(table, tmp_path)
    )


def test_a_wide_panel_takes_a_line_and_narrow_ones_share_one():
    def height(*panels):
        return build_figure(grid_table(list(panels)), panels, {}).get_figheight()

    assert height(HEATMAP, SWEEP) == max(height(HEATMAP), height(SWEEP))
    assert height(HEATMAP, PARALLEL) == height(HEATMAP) + height(PARALLEL)


@pytest.mark.parametrize("panel", [SWEEP, PARALLEL, HEATMAP], ids=kind_of)
def test_failed_and_unmatched_runs_are_in_the_panel_and_alone_they_are_no_figure(panel):
    failed = [run_at("lora", 64, 5, status="oom"), run_at("eva", 4, 0, 0.35)]
    figure = build_figure(grid_table([panel], failed), [panel], {})
    texts = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "not finished: 1 oom" in texts
    assert "eva" in texts
    empty = grid_table([panel], [run_at("lora", 4, 0, status="oom")], variants=())
    assert draw_figure(empty, {}) is None


@pytest.mark.parametrize("panel", [SWEEP, PARALLEL, HEATMAP, GROUPED], ids=kind_of)
def test_runs_that_lack_the_number_are_counted_in_the_panel(panel, tmp_path):
    table = grid_table([panel], [run_at("lora", 8, 0)])
    logs = logs_of(table, tmp_path)
    figure = build_figure(table, [panel], logs)
    notes = " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(Text))
    missing = "a log" if panel.kind == "curves" else KD
    assert f"left out: 1 run without {missing}" in notes


def test_curves_by_group_leave_out_and_count_what_did_not_finish(tmp_path):
    table = grid_table([GROUPED], [run_at("lora", 8, 0, 0.3, status="diverged")])
    figure = build_figure(table, [GROUPED], logs_of(table, tmp_path))
    (axes,) = figure.axes
    # 9 runs have a log; the one that diverged is in no mean.
    assert [line.get_label() for line in axes.get_lines()] == ["lora", "dora"]
    assert axes.get_lines()[0].get_xydata().tolist() == [[50.0, 0.9], [100.0, 0.5]]
    assert "not finished: 1 diverged" in " ".join(text.get_text() for text in axes.texts)


def test_a_panel_over_a_key_that_no_record_has_is_refused_by_its_place():
    wrong = PanelSpec(kind="heatmap", x=["lora"], y="lora.rr", z=KD)
    with pytest.raises(ValueError, match=r"figures\[1\]\.y: no record.*'lora\.rr'.*lora\.r"):
        draw_figure(grid_table([SWEEP, wrong]), {})
    wrong = PanelSpec(kind="curves", x=["step"], y=KD, by="zzz")
    with pytest.raises(ValueError, match=r"figures\[0\]\.by: no record.*'zzz'"):
        draw_figure(grid_table([wrong]), {})


def test_a_panel_with_a_name_is_a_file_too_and_looks_as_it_would_alone():
    named = PanelSpec(kind="heatmap", x=["lora.r"], y="lora", z=KD, name="ranks")
    assert draw_named(grid_table([SWEEP]), {}) == {}
    files = draw_named(grid_table([SWEEP, named]), {})
    assert files == {"figure-ranks.png": draw_figure(grid_table([HEATMAP]), {})}
    assert draw_figure(grid_table([SWEEP, named]), {}) == draw_figure(
        grid_table([SWEEP, HEATMAP]), {}
    )
    with pytest.raises(ValueError, match="2 panels have the name 'ranks'"):
        draw_named(grid_table([named, named]), {})
    nothing = PanelSpec(kind="seeds", x=["val/ce"], name="empty")
    assert draw_named(grid_table([nothing]), {}) == {}


VARIANTS = [f"variant_{i}" for i in range(13)]


@pytest.mark.parametrize("variants", [VARIANTS, VARIANTS[:2]], ids=len)
@pytest.mark.parametrize("panel", KEYED, ids=kind_of)
def test_every_text_is_within_the_figure_and_no_tick_touches_the_next(
    panel, variants, tmp_path, monkeypatch
):
    drawn = []
    draw = Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, to: (drawn.append(self), draw(self, to)))
    failed = [run_at("variant_0", 64, 5, status="oom")]
    table = grid_table([panel], failed, variants, groups=False)
    figure = build_figure(table, [panel], logs_of(table, tmp_path))
    figure.canvas.draw()
    seen = [text for text in drawn if text.get_text()]
    assert seen
    for text in seen:
        box = Text.get_window_extent(text)
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
    for axes in figure.axes:
        ticks = [t for t in axes.get_xticklabels() if t in seen and not t.get_rotation()]
        boxes = sorted((t.get_window_extent() for t in ticks), key=lambda box: box.x0)
        assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
