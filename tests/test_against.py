import csv
import io
import random

import pytest
from example_runs import example_run
from scipy import stats

from neo.results.against import compare
from neo.results.bootstrap import _interval, bootstrap_interval
from neo.results.cells import against_lines, cells
from neo.results.markdown import marked, render_markdown
from neo.results.paired import holm
from neo.results.row_spec import RowSpec
from neo.results.table_csv import render_csv
from neo.results.table_spec import ColumnSpec, TableSpec
from neo.results.tables import build_table

BASE = [1.0, 2.0, 3.0, 4.0, 5.0]
SCORE = ColumnSpec(
    key="val/ce", source="metric", label="ce", unit="", decimals=2, better="lower", scale=1.0,
    compare=True,
)  # fmt: skip
SHARE = ColumnSpec(
    key="val/agreement", source="metric", label="agreement", unit="%", decimals=1,
    better="higher", scale=100.0, compare=True,
)  # fmt: skip


def row(label, **changes):
    return RowSpec(**({"label": label, "where": {"method": [label]}} | changes))


def table_of(values, columns=(SCORE,), rows=None, **changes):
    """A table whose row `method` has `values[method]`, a number per seed or None."""
    records = [
        example_run(
            method,
            seed,
            started_at="2026-01-01T00:00:00Z",
            metrics={} if value is None else {column.key: value for column in columns},
        )
        for method, numbers in values.items()
        for seed, value in enumerate(numbers)
    ]
    spec = TableSpec(
        title="T",
        rows=rows or [row(method) for method in values],
        columns=list(columns),
        baseline="base",
        **changes,
    )
    return build_table(spec, records)


def texts(table):
    return [[marked(cell) for cell in line] for line in cells(table)]


def against(table):
    head, body = against_lines(table)
    return head, [[marked(cell) for cell in line] for line in body]


def shifted(*changes):
    return [b + c for b, c in zip(BASE, changes, strict=True)]


CLEAR = shifted(-1.0, -1.1, -0.9, -1.05, -0.95)
WORSE = shifted(1.0, 1.1, 0.9, 1.05, 0.95)
NOISE = shifted(0.5, -0.6, 0.4, -0.3, 0.1)


def test_every_row_is_compared_with_the_baseline_and_p_is_corrected_for_all_of_them():
    table = table_of({"base": BASE, "clear": CLEAR, "noise": NOISE, "worse": WORSE})
    found = table.comparisons(SCORE)
    raw = [float(stats.ttest_rel(x, BASE).pvalue) for x in (CLEAR, NOISE, WORSE)]
    assert list(found) == [1, 2, 3]
    assert [c.paired.p for c in found.values()] == pytest.approx(raw)
    assert [c.p_holm for c in found.values()] == pytest.approx(holm(raw))


def test_only_what_is_better_than_the_baseline_by_the_test_is_bold():
    table = table_of({"base": BASE, "clear": CLEAR, "noise": NOISE, "worse": WORSE})
    bold = [False, True, False, False]
    assert ["**" in line[0] for line in texts(table)] == bold
    assert ["**" in line[2] for line in against(table)[1]] == bold[1:]
    assert "better than base by the paired test" in render_markdown(table)


def test_where_higher_is_better_the_sign_turns():
    values = {
        "base": [0.1, 0.2, 0.3, 0.4, 0.5],
        "up": [0.21, 0.30, 0.39, 0.51, 0.60],
        "down": [0.01, 0.09, 0.20, 0.31, 0.40],
    }
    table = table_of(values, (SHARE,))
    assert ["**" in line[0] for line in texts(table)] == [False, True, False]


def test_bold_follows_the_corrected_p_and_not_the_raw_one():
    edge = shifted(-0.3, -1.4, -0.6, -1.2, -1.8)
    assert 0.004 < stats.ttest_rel(edge, BASE).pvalue < 0.05
    few = table_of({"base": BASE, "edge": edge})
    many = table_of({"base": BASE, "edge": edge, **{f"noise{i}": NOISE for i in range(9)}})
    assert ["**" in line[0] for line in texts(few)] == [False, True]
    assert not any("**" in line[0] for line in texts(many))


def test_a_wide_gap_between_means_is_not_bold_without_the_test():
    gap = [b - 10.0 for b in BASE[:1]]
    assert not any("**" in line[0] for line in texts(table_of({"base": BASE, "gap": gap})))


def test_a_column_that_is_not_compared_has_no_bold_and_no_second_table_entry():
    plain = ColumnSpec(
        key="val/kd", source="metric", label="kd", unit="", decimals=2, better="lower", scale=1.0
    )
    table = table_of({"base": BASE, "clear": CLEAR}, (SCORE, plain))
    assert ["**" in line[1] for line in texts(table)] == [False, False]
    assert against(table)[0] == ["", "n", "ce ↓", "p"]


def test_only_the_seeds_that_both_have_are_paired():
    values = [None, *CLEAR[1:4], None]
    table = table_of({"base": [*BASE[:4], None], "some": values})
    comparison = table.comparisons(SCORE)[1]
    oracle = stats.ttest_rel(CLEAR[1:4], BASE[1:4])
    assert comparison.paired.n == 3
    assert comparison.paired.p == pytest.approx(float(oracle.pvalue))
    assert against(table)[1][0][1] == "3"


def test_fewer_than_two_shared_seeds_are_a_dash_and_no_part_of_the_correction():
    table = table_of({"base": BASE, "clear": CLEAR, "one": CLEAR[:1], "none": []})
    _, (clear, one, none) = against(table)
    assert one[1:] == none[1:] == ["—", "—", "—"]
    assert table.comparisons(SCORE)[1].p_holm == table.comparisons(SCORE)[1].paired.p
    assert "—" not in clear


def test_a_column_with_fewer_pairs_than_its_line_says_so():
    records = [
        example_run(m, s, metrics={"val/ce": x} | ({"val/agreement": x / 10} if s < 3 else {}))
        for m, numbers in (("base", BASE), ("clear", CLEAR))
        for s, x in enumerate(numbers)
    ]
    spec = TableSpec(
        title="T", rows=[row("base"), row("clear")], columns=[SCORE, SHARE], baseline="base"
    )
    ((_, n, ce, _, agreement, _),) = against(build_table(spec, records))[1]
    assert n == "5"
    assert "(n=" not in ce
    assert agreement.endswith("(n=3)")


def test_the_difference_is_printed_with_its_sign_its_interval_and_its_unit():
    values = {"base": [0.1, 0.2, 0.3], "up": [0.2, 0.31, 0.42]}
    head, ((_, n, text, p),) = against(table_of(values, (SHARE,)))
    assert head == ["", "n", "agreement (points) ↑", "p"]
    assert (n, text) == ("3", "**+11.0** [+8.5, +13.5]")
    assert p == "0.003"


def test_equal_rows_differ_by_nothing_and_have_no_p():
    (line,) = against(table_of({"base": BASE, "same": BASE}))[1]
    assert line == ["same", "5", "0.00 [0.00, 0.00]", "—"]


def test_rows_are_compared_within_their_group_and_references_not_at_all():
    rows = [
        row("base", group="a"),
        row("x", group="a"),
        row("base", group="b", where={"method": ["other"]}),
        row("x", group="b"),
        row("teacher", reference=True),
    ]
    table = table_of({"base": BASE, "other": CLEAR, "x": CLEAR, "teacher": WORSE}, rows=rows)
    found = compare(table.rows, "base", SCORE)
    assert list(found) == [1, 3]
    assert found[1].paired.difference == pytest.approx(-1.0)
    assert found[3].paired.difference == 0.0


def test_the_note_says_why_the_t_test_and_what_it_assumes():
    text = render_markdown(table_of({"base": BASE, "clear": CLEAR}))
    for expected in (
        "## Against base, seed by seed",
        "Holm's correction",
        "no p below 2/32 = 0.0625",
        "normal distribution",
    ):
        assert expected in text


def test_the_csv_has_both_ps_and_the_interval_in_recorded_units():
    values = {"base": [0.1, 0.2, 0.3], "up": [0.2, 0.31, 0.42]}
    table = table_of(values, (SHARE,))
    base, up = csv.DictReader(io.StringIO(render_csv(table)))
    paired = table.comparisons(SHARE)[1].paired
    assert base["val/agreement_difference"] == ""
    assert float(up["val/agreement_difference"]) == pytest.approx(0.11)
    assert float(up["val/agreement_difference_low"]) == paired.low
    assert float(up["val/agreement_difference_high"]) == paired.high
    assert float(up["val/agreement_p"]) == float(up["val/agreement_p_holm"]) == paired.p
    assert up["val/agreement_pairs"] == "3"


def test_without_records_the_second_table_is_all_dashes():
    assert against(table_of({"base": [], "x": []}))[1] == [["x", "—", "—", "—"]]
    assert "sign-flip" not in render_markdown(table_of({"base": [], "x": []}))


def test_a_bootstrap_interval_is_shown_and_named_where_it_is_asked_for():
    values = {"base": BASE, "clear": CLEAR}
    by_t, by_bootstrap = (table_of(values, interval=kind) for kind in ("t", "bootstrap"))
    low, high = bootstrap_interval([a - b for a, b in zip(CLEAR, BASE, strict=True)], 0.95)
    (line,) = against(by_bootstrap)[1]
    assert line[2] == f"**-1.00** [{low:+.2f}, {high:+.2f}]"
    assert line[2] != against(by_t)[1][0][2]
    assert line[3] == against(by_t)[1][0][3]
    (_, row) = csv.DictReader(io.StringIO(render_csv(by_bootstrap)))
    assert float(row["val/ce_difference_low"]) == low


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [(5, "with 5 it holds the true mean in about 84 of 100 cases"), (12, "a little too narrow")],
)
def test_the_note_names_the_interval_the_number_of_pairs_and_what_few_of_them_do(pairs, expected):
    base = [float(seed) for seed in range(pairs)]
    values = {"base": base, "x": [b - 1 - 0.1 * (b % 3) for b in base]}
    text = render_markdown(table_of(values, interval="bootstrap"))
    assert "paired bootstrap over them (BCa, 9,999 resamples)" in text
    assert "t distribution; p" not in text
    assert expected in text
    by_t = render_markdown(table_of(values))
    assert "by the paired t distribution" in by_t
    assert "bootstrap" not in by_t


def test_a_table_with_bootstrap_intervals_is_the_same_each_time_it_is_rendered():
    rng = random.Random(0)
    values = {name: [rng.gauss(0, 1) for _ in range(9)] for name in ("base", "x", "y")}
    first, second = (table_of(values, interval="bootstrap") for _ in range(2))
    text = render_csv(first)  # which has all digits
    _interval.cache_clear()
    assert render_csv(second) == text
