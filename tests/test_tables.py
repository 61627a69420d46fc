import csv
import io
import random
import statistics

import pytest
from example_runs import example_run
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from neo.results.cells import cells, lines
from neo.results.markdown import marked, render_markdown
from neo.results.printing import MISSING
from neo.results.records import STATUSES
from neo.results.row_spec import RowSpec
from neo.results.summary import summarize
from neo.results.table_csv import render_csv
from neo.results.table_spec import ColumnSpec, TableSpec
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


NOT_OK = [status for status in STATUSES if status != "ok"]


@pytest.mark.parametrize("absent", [True, False])
def test_a_key_that_a_run_does_not_have_is_null(absent):
    plain = runs("neo", [1.0], config={"teacher": {} if absent else {"kind": None}})
    kept = runs("lora", [2.0], config={"teacher": {"kind": "top_k"}})
    where = [{"teacher.kind": [None]}, {"teacher.kind": ["top_k"]}]
    rows = [RowSpec(label=str(i), where=each) for i, each in enumerate(where)]
    made = build_table(spec(rows), [*plain, *kept])
    assert [row.runs for row in made.rows] == [plain, kept]


@pytest.mark.parametrize("status", NOT_OK)
def test_a_run_that_did_not_finish_is_listed_with_its_reason_and_stays_out_of_the_mean(status):
    records = [*runs("neo", [1.0]), example_run("neo", 1, status=status, error="a\nb | c")]
    records[1].metrics["val/ce"] = 99.0
    table = build_table(spec([row("neo")]), records)
    assert texts(table)[0][0] == "1.00"
    assert f"- neo, seed 1, run neo1: {status} (a b \\| c)" in render_markdown(table)


def test_how_many_runs_of_a_row_did_not_finish_stands_beside_n():
    records = [
        *runs("neo", [1.0, 2.0]),
        example_run("neo", 2, status="oom"),
        example_run("neo", 3, status="diverged"),
        example_run("neo", 4, status="oom"),
        *runs("kd", [None], status="failed"),
        *runs("sft", [1.0]),
    ]
    table = build_table(spec([row("neo"), row("kd"), row("sft")]), records)
    assert [line[1].text for line in lines(table)] == ["2 (1 diverged, 2 oom)", "0 (1 failed)", "1"]
    assert "A run that did not finish stands in brackets" in render_markdown(table)
    fine = build_table(spec([row("sft")]), records)
    assert "did not finish" not in render_markdown(fine)


def test_the_csv_counts_the_runs_that_did_not_finish_and_says_why():
    records = [
        *runs("neo", [1.0]),
        example_run("neo", 1, status="oom", error="too\nbig"),
        example_run("neo", 2, status="interrupted"),
    ]
    (line,) = csv.DictReader(io.StringIO(render_csv(build_table(spec([row("neo")]), records))))
    assert (line["n"], line["not_finished"]) == ("1", "2")
    assert line["why"] == "seed 1, run neo1: oom (too big); seed 2, run neo2: interrupted"


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


def test_a_list_is_one_value():
    records = [
        example_run("neo", i, config={"lora": {"target_modules": of}}, metrics={"val/ce": float(i)})
        for i, of in enumerate([["q", "v"], "all", ["q"]])
    ]
    key = "lora.target_modules"
    assert cell(records, [row("neo", where={key: [["q", "v"]]})]) == "0.00"
    assert cell(records, [row("neo", where={key: ["q", "v"]})]) == MISSING
    assert cell(records, [row("neo", where={key: [["q"], "all"]})]) == "1.50 ± 0.71"


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


GOOD = [1.0, 1.2, 1.1, 0.9]
BAD = [2.0, 2.1, 2.2, 1.9]


def bold(*numbers, columns=None, **changes):
    """Return which of the rows `row0`, `row1` ... is bold; `changes` are those of the last."""
    names = [f"row{i}" for i in range(len(numbers))]
    rows = [row(name) for name in names[:-1]] + [row(names[-1], **changes)]
    records = [run for name, some in zip(names, numbers, strict=True) for run in runs(name, some)]
    table = build_table(spec(rows, columns), records)
    return ["**" in line[0] for line in texts(table)]


def test_the_best_row_is_bold_where_the_paired_test_says_so_and_whatever_stands_first():
    assert bold(GOOD, BAD) == [True, False]
    assert bold(BAD, GOOD) == [False, True]
    assert bold(GOOD, [1.1, 1.1, 1.2, 1.0]) == [False, False]


def test_a_small_gap_that_every_seed_shows_is_bold_and_a_large_one_of_one_seed_is_not():
    seeds = [0.0, 10.0, -5.0]
    steady = [s - d for s, d in zip(seeds, (0.10, 0.11, 0.12), strict=True)]
    assert bold(steady, seeds) == [True, False]
    assert bold([0.0, 10.0, -95.0], seeds) == [False, False]


def test_the_best_row_has_to_beat_every_other_row_and_not_only_the_second():
    noisy = [x + d for x, d in zip(GOOD, (9.0, -2.0, 11.0, -1.0), strict=True)]
    assert statistics.mean(noisy) > statistics.mean(BAD)
    assert bold(GOOD, BAD, noisy) == [False, False, False]


def test_bold_follows_holms_correction_for_all_other_rows_of_the_group():
    near = [x + d for x, d in zip(GOOD, (0.2, 0.7, 0.3, 0.8), strict=True)]
    assert 0.025 < stats.ttest_rel(GOOD, near).pvalue < 0.05
    assert bold(GOOD, near) == [True, False]
    assert bold(GOOD, near, BAD) == [True, False, False]
    assert bold(GOOD, near, near) == [False, False, False]


def test_rows_that_are_equal_but_for_chance_are_rarely_bold():
    rng = random.Random(0)
    marked_tables = 0
    for _ in range(200):
        seeds = [rng.gauss(0, 3) for _ in range(3)]
        rows = [[s + rng.gauss(0, 1) for s in seeds] for _ in range(3)]
        marked_tables += any(bold(*rows, columns=[column(decimals=6)]))
    assert marked_tables <= 0.05 * 200


def test_a_row_that_cannot_be_tested_leaves_no_best():
    assert bold(GOOD, BAD, [3.0]) == [False, False, False]
    assert bold(GOOD[:1], BAD[:1]) == [False, False]
    assert bold(GOOD, BAD, []) == [True, False, False]


def test_differences_that_are_all_equal_leave_nothing_to_test():
    assert bold([1.0, 1.0], [2.0, 2.0]) == [False, False]


def test_only_the_seeds_that_both_rows_have_are_compared():
    assert bold([*GOOD, 99.0, 99.0], BAD) == [False, False]
    assert bold([*GOOD, -99.0], [*BAD, None]) == [True, False]


def test_bold_needs_a_difference_that_is_printed():
    other = [x + d for x, d in zip(GOOD, (0.0010, 0.0011, 0.0012, 0.0011), strict=True)]
    assert bold(GOOD, other) == [False, False]
    assert bold(GOOD, other, columns=[column(decimals=4)]) == [True, False]


def test_reference_rows_and_rows_of_other_groups_do_not_compete():
    assert bold(BAD, GOOD, reference=True) == [False, False]
    assert bold(BAD, GOOD, group="clean") == [False, False]
    assert bold(GOOD, BAD, [0.1, 0.2], reference=True) == [True, False, False]


def test_where_higher_is_better_the_largest_mean_is_bold_and_without_direction_none():
    assert bold(GOOD, BAD, columns=[column(better="higher")]) == [False, True]
    assert bold(GOOD, BAD, columns=[column(better=None)]) == [False, False]


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
    rows = [row("neo"), row("kd")]
    text = render_markdown(build_table(spec(rows, command="make demo"), records))
    for expected in (
        "# T\n",
        "two-sided paired t test",
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
