import csv
import io
import random
import statistics

import pytest
from example_runs import example_run
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.results.cells import cells
from neo.results.markdown import marked, render_markdown
from neo.results.printing import MISSING
from neo.results.summary import summarize
from neo.results.table_csv import render_csv
from neo.results.table_spec import ColumnSpec, RowSpec, TableSpec
from neo.results.tables import build_table


def column(key="val/ce", **changes):
    fields = {"label": key, "unit": "", "decimals": 2, "better": "lower", "scale": 1.0}
    source = "metric" if "/" in key else "field"
    return ColumnSpec(**({"key": key, "source": source} | fields | changes))


def row(method, **changes):
    return RowSpec(**({"label": method, "where": {"method": [method]}} | changes))


def spec(rows, columns=None, **changes):
    return TableSpec(title="T", rows=rows, columns=columns or [column()], **changes)


def runs(method, values, **changes):
    return [
        example_run(method, seed, metrics={} if value is None else {"val/ce": value}, **changes)
        for seed, value in enumerate(values)
    ]


def texts(table):
    return [[marked(cell) for cell in line] for line in cells(table)]


def cell(records, rows, columns=None):
    return texts(build_table(spec(rows, columns), records))[0][0]


def test_a_cell_is_the_mean_and_sample_standard_deviation_over_seeds():
    values = [1.0, 2.0, 4.5]
    expected = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert cell(runs("neo", values), [row("neo")]) == expected == "2.50 ± 1.80"


def test_a_single_seed_has_no_standard_deviation():
    assert cell(runs("neo", [1.0]), [row("neo")]) == "1.00"


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_the_order_of_the_records_changes_no_byte(values, seed):
    records = runs("neo", values) + runs("kd", values, status="failed", error="out of luck")
    shuffled = random.Random(seed).sample(records, len(records))
    rows = [row("neo"), row("kd")]
    first, second = (build_table(spec(rows), some) for some in (records, shuffled))
    assert render_markdown(first) == render_markdown(second)
    assert render_csv(first) == render_csv(second)


def test_a_missing_number_is_a_dash_and_never_zero():
    records = [*runs("neo", [None, None]), *runs("kd", [0.0])]
    table = build_table(spec([row("neo"), row("kd"), row("sft")]), records)
    assert [line[0] for line in texts(table)] == [MISSING, "0.00", MISSING]
    assert [line["val/ce"] for line in csv.DictReader(io.StringIO(render_csv(table)))] == [
        "",
        "0.0",
        "",
    ]


def test_a_number_that_some_seeds_lack_says_how_many_it_is_made_of():
    assert cell(runs("neo", [1.0, None, 3.0]), [row("neo")]) == "2.00 ± 1.41 (n=2)"


@pytest.mark.parametrize("status", ["failed", "oom", "diverged", "interrupted"])
def test_a_run_that_did_not_finish_is_listed_with_its_reason_and_stays_out_of_the_mean(status):
    records = [*runs("neo", [1.0]), example_run("neo", 1, status=status, error="a\nb | c")]
    records[1].metrics["val/ce"] = 99.0
    table = build_table(spec([row("neo")]), records)
    assert texts(table)[0][0] == "1.00"
    assert f"- neo, seed 1, run neo1: {status} (a b \\| c)" in render_markdown(table)


def test_a_run_that_matches_no_row_is_handed_back():
    table = build_table(spec([row("neo")]), [*runs("neo", [1.0]), *runs("kd", [2.0])])
    assert [run.run_id for run in table.unmatched] == ["kd0"]


def test_rows_are_chosen_by_group_choice_and_by_config_path():
    records = [
        example_run("neo", i, config={"loss": {"kd_ratio": ratio}}, metrics={"val/ce": float(i)})
        for i, ratio in enumerate([0.5, 0.9])
    ]
    assert cell(records, [row("neo", where={"method": ["neo"], "loss.kd_ratio": [0.9]})]) == "1.00"
    assert cell(records, [row("neo", where={"loss.kd_ratio": [0.5, 0.9]})]).startswith("0.50")


def test_true_is_not_one():
    records = [example_run("neo", config={"data": {"packing": True}}, metrics={"val/ce": 1.0})]
    assert cell(records, [row("neo", where={"data.packing": [1]})]) == MISSING
    assert cell(records, [row("neo", where={"data.packing": [True]})]) == "1.00"


def test_a_where_key_that_no_record_has_is_refused():
    with pytest.raises(ValueError, match=r"rows\[0\]\.where: .*'loss\.kd_ration'"):
        cell(runs("neo", [1.0]), [row("neo", where={"loss.kd_ration": [0.5]})])


def test_two_finished_runs_of_one_seed_in_one_row_are_refused():
    records = [example_run("neo", 0), example_run("neo", 0, run_id="other")]
    with pytest.raises(ValueError, match="two runs of seed 0: neo0 and other"):
        cell(records, [row("neo")])


def bold(first, second, **changes):
    table = build_table(
        spec([row("neo"), row("kd", **changes)]), runs("neo", first) + runs("kd", second)
    )
    return ["**" in line[0] for line in texts(table)]


def test_bold_needs_a_gap_larger_than_both_standard_deviations():
    assert bold([1.0, 1.2], [2.0, 2.2]) == [True, False]
    assert bold([2.0, 2.2], [1.0, 1.2]) == [False, True]
    assert bold([1.0, 1.2], [1.0, 3.0]) == [False, False]
    assert bold([0.0, 1.5], [1.6, 1.6]) == [False, False]


def test_bold_needs_two_seeds_of_the_best_and_of_the_second():
    assert bold([1.0], [2.0, 2.2]) == [False, False]
    assert bold([1.0, 1.2], [2.0]) == [False, False]


def test_bold_needs_a_difference_that_is_printed():
    assert bold([1.0, 1.0], [1.0001, 1.0001]) == [False, False]


def test_reference_rows_and_rows_of_other_groups_do_not_compete():
    assert bold([2.0, 2.2], [1.0, 1.2], reference=True) == [False, False]
    assert bold([2.0, 2.2], [1.0, 1.2], group="clean") == [False, False]


def test_where_higher_is_better_the_largest_mean_is_bold_and_without_direction_none():
    records = runs("neo", [1.0, 1.2]) + runs("kd", [2.0, 2.2])
    rows = [row("neo"), row("kd")]
    for better, expected in (("higher", [False, True]), (None, [False, False])):
        table = build_table(spec(rows, [column(better=better)]), records)
        assert ["**" in line[0] for line in texts(table)] == expected


def test_a_cell_is_printed_in_the_columns_unit_and_the_csv_in_the_recorded_one():
    records = [example_run(num_trainable_parameters=1_234_567)]
    columns = [column("num_trainable_parameters", scale=1e-3, unit="k", decimals=0, better=None)]
    table = build_table(spec([row("neo")], columns), records)
    assert texts(table)[0][0] == "1,235"
    assert "num_trainable_parameters (k)" in render_markdown(table)
    assert "1234567.0" in render_csv(table)


def test_the_papers_number_stands_beside_ours_with_the_difference():
    rows = [row("neo", paper={"val/ce": 1.5}), row("kd", paper={"val/ce": 3})]
    table = build_table(spec(rows), runs("neo", [1.0]))
    assert [line[0] for line in texts(table)] == [
        "1.00 (paper 1.50, -0.50)",
        f"{MISSING} (paper 3.00)",
    ]
    assert "the paper's number" in render_markdown(table)


def test_a_range_shows_the_lowest_and_the_highest_seed():
    columns = [column(range=True, scale=10.0)]
    assert (
        cell(runs("neo", [3.0, 1.0, 2.0]), [row("neo")], columns) == "20.00 ± 10.00 [10.00, 30.00]"
    )
    assert cell(runs("neo", [3.0]), [row("neo")], columns) == "30.00"
    assert cell(runs("neo", [3.0, 3.0]), [row("neo")], columns) == "30.00"
    table = build_table(spec([row("neo")], columns), runs("neo", [3.0, 1.0, None]))
    assert texts(table)[0][0] == "20.00 ± 14.14 [10.00, 30.00] (n=2)"
    assert "the lowest and the highest seed" in render_markdown(table)
    (line,) = csv.DictReader(io.StringIO(render_csv(table)))
    assert (line["val/ce_low"], line["val/ce_high"]) == ("1.0", "3.0")


def setting(key):
    return column(key, source="config", better=None)


def test_a_config_column_shows_the_setting_of_the_runs_as_typed():
    records = [
        example_run("neo", i, config={"optim": {"lr": lr}, "data": {"packing": True}})
        for i, lr in enumerate([0.0003, 0.0003, 0.01])
    ]
    columns = [setting("optim.lr"), setting("data.packing"), setting("method")]
    table = build_table(spec([row("neo"), row("kd")], columns), records)
    assert texts(table) == [["0.0003, 0.01", "true", "neo"], [MISSING] * 3]
    assert next(csv.DictReader(io.StringIO(render_csv(table))))["optim.lr"] == "0.0003, 0.01"


def test_a_config_column_that_no_record_has_is_refused():
    with pytest.raises(ValueError, match=r"columns\[0\]\.config: .*'optim\.lrr'"):
        build_table(spec([row("neo")], [setting("optim.lrr")]), runs("neo", [1.0]))


def test_notes_and_an_included_text_stand_under_the_table():
    table = build_table(spec([row("neo")], included="# More\n\ntext\n\n"), runs("neo", [1.0]))
    text = render_markdown(table, ["Chosen: this.", "", "* one"])
    assert "\n\nChosen: this.\n\n* one\n\n- Code: " in text
    assert text.endswith("\n\n# More\n\ntext\n")


def test_no_cell_reads_minus_zero():
    assert cell(runs("neo", [-0.0001]), [row("neo")]) == "0.00"


def test_under_the_table_stand_rule_command_code_dates_devices_and_versions():
    records = [
        example_run(
            "neo",
            seed,
            commit="0123456789" * 4,
            dirty=bool(seed),
            device="cpu: X, 2 cores",
            versions={"torch": "2.13.0"},
        )
        for seed in range(2)
    ]
    text = render_markdown(build_table(spec([row("neo")], command="make demo"), records))
    for expected in (
        "# T\n",
        "further apart than both",
        "- Command: `make demo`",
        "- Code: 0123456, 0123456 with local changes",
        "- Runs: 2, started 2026-01-01T00:00:00Z to 2026-01-02T00:00:00Z",
        "- Device: cpu: X, 2 cores",
        "- Versions: torch 2.13.0",
    ):
        assert expected in text


def test_every_line_of_the_table_has_as_many_cells_as_the_header():
    rows = [row("neo", group="a | b"), row("kd")]
    table = build_table(spec(rows, group_label="rows"), runs("neo", [1.0, 2.0]))
    lines = [x for x in render_markdown(table).splitlines() if x.startswith("|")]
    assert len(lines) == 4
    assert {line.replace("\\|", "").count("|") for line in lines} == {5}


def test_a_table_without_any_record_is_all_dashes():
    table = build_table(spec([row("neo")]), [])
    assert texts(table) == [[MISSING]]
    assert "Runs:" not in render_markdown(table)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=6))
def test_a_mean_lies_between_its_values(values):
    summary = summarize(runs("neo", values), "val/ce")
    slack = 1e-9 * (1 + max(abs(value) for value in values))
    assert min(values) - slack <= summary.mean <= max(values) + slack
    assert summary.n == len(values)
