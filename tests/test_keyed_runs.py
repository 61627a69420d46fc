import pytest
from example_grid import KD, grid, run_at

from neo.results.keyed_runs import averaged_over, keyed_runs, require_key, shown_runs
from neo.results.row_spec import RowSpec
from neo.results.table_spec import ColumnSpec, TableSpec
from neo.results.tables import build_table


def table_of(records, rows):
    column = ColumnSpec(
        key=KD, source="metric", label="kd", unit="", decimals=2, better="lower", scale=1.0
    )
    return build_table(TableSpec(title="T", rows=rows, columns=[column]), records)


def test_every_run_is_shown_but_those_of_reference_rows():
    records = [
        run_at("lora", 4, 0, 0.5),
        run_at("lora", 4, 1, status="oom"),
        run_at("dora", 4, 0, 0.5),  # matches no row
        run_at("teacher", 4, 0, 0.1),
        run_at("teacher", 4, 1, status="failed"),
    ]
    rows = [
        RowSpec(label="LoRA", group="g", where={"lora": ["lora"]}),
        RowSpec(label="teacher", reference=True, where={"lora": ["teacher"]}),
    ]
    shown = shown_runs(table_of(records, rows))
    assert {run.run_id for run in shown} == {"lora-4-0-ok", "lora-4-1-oom", "dora-4-0-ok"}


def test_a_run_of_two_rows_is_shown_once():
    rows = [RowSpec(label=label, where={"lora": ["lora"]}) for label in "ab"]
    assert len(shown_runs(table_of([run_at("lora", 4, 0, 0.5)], rows))) == 1


def test_each_run_is_finished_failed_or_counted_as_left_out():
    runs = [
        run_at("lora", 4, 0, 0.5),
        run_at("lora", 4, 1),
        run_at("lora", 4, 2, status="diverged", metrics={KD: 7.0}),
        run_at("lora", 4, 3, 0.5, config={}),
        run_at("lora", 4, 4, config={}, status="oom"),
        run_at("lora", 8, 5, status="oom"),
    ]
    found = keyed_runs(runs, ["lora", "lora.r"], KD)
    assert [(k.run.seed, k.values, k.number) for k in found.finished] == [(0, ("lora", 4), 0.5)]
    assert [(k.run.seed, k.values) for k in found.failed] == [(2, ("lora", 4)), (5, ("lora", 8))]
    assert found.left_out == [
        "left out: 1 run without val/kd",
        "left out: 2 runs without lora.r",
    ]
    assert found.not_finished == "not finished: 1 diverged, 1 oom"


def test_a_share_is_shown_in_percent_and_a_field_is_a_number_too():
    run = run_at("lora", 4, metrics={"val/agreement": 0.25}, seconds=3)
    assert keyed_runs([run], ["lora"], "val/agreement").finished[0].number == 25.0
    assert keyed_runs([run], ["lora"], "seconds").finished[0].number == 3.0


def test_a_key_that_no_record_has_is_refused_with_the_place_and_what_is_near():
    runs = [run_at("lora", 4)]
    require_key(runs, "lora", "figures[0].x")
    require_key(runs, "lora.r", "figures[0].x")
    require_key([], "nothing.yet", "figures[0].x")
    with pytest.raises(
        ValueError, match=r"figures\[0\]\.x: .*'optim\.lrr'; did you mean optim\.lr"
    ):
        require_key(runs, "optim.lrr", "figures[0].x")
    with pytest.raises(ValueError, match=r"'zzz'; legal: method, lora, lora\.r, optim\.lr, seed"):
        require_key(runs, "zzz", "figures[0].x")


def test_a_mean_over_seeds_only_is_over_nothing_else():
    cells = [grid({("lora", 4): [0.1, 0.2]}), grid({("lora", 8): [0.1]})]
    assert averaged_over(cells, ["lora.r"]) == []


def test_a_mean_over_other_settings_names_them_but_not_the_panels_keys():
    mixed = grid({("lora", 4): [0.1, 0.2], ("lora", 8): [0.1, 0.2]})
    assert averaged_over([mixed], ["lora"]) == ["lora.r"]
    assert averaged_over([mixed], ["lora", "lora.r"]) == []


def test_a_choice_stands_for_the_keys_in_its_group():
    runs = grid({("lora", 4): [0.1], ("dora", 8): [0.1]})
    assert averaged_over([runs], ["optim.lr"]) == ["lora"]


def test_where_a_run_is_kept_is_no_setting():
    runs = [
        run_at("lora", 4, 0, 0.1, run_id=name, config={"lora": {"r": 4}, "run_dir": name})
        for name in "ab"
    ]
    assert averaged_over([runs], ["lora"]) == []
