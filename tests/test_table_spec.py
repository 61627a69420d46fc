import pytest

from neo.results.table_spec import read_table_spec

ROW = "{label: Neo, where: {method: neo}}"
COLUMN = "{metric: val/ce}"


def spec_of(tmp_path, text):
    path = tmp_path / "table.yaml"
    path.write_text(text, encoding="utf-8")
    return read_table_spec(path)


def table(*, rows=ROW, columns=COLUMN, more=""):
    return f"title: T\nrows: [{rows}]\ncolumns: [{columns}]\n{more}\n"


def test_a_column_takes_unit_decimals_and_direction_from_the_metric(tmp_path):
    (column,) = spec_of(tmp_path, table(columns="{metric: val/agreement}")).columns
    assert (column.unit, column.decimals, column.better, column.scale) == ("%", 1, "higher", 100.0)
    assert column.header == "val/agreement (%) ↑"


def test_what_a_column_states_wins_over_the_metric(tmp_path):
    columns = (
        "{field: num_parameters, label: size, unit: M, scale: 0.000001, decimals: 2, "
        "better: lower}, "
        "{metric: val/ce, better: null}"
    )
    size, ce = spec_of(tmp_path, table(columns=columns)).columns
    assert size.header == "size (M) ↓"
    assert (size.scale, size.decimals) == (1e-6, 2)
    assert ce.better is None


def test_one_value_and_a_list_of_values_are_both_legal_in_where(tmp_path):
    rows = "{label: A, where: {method: neo, seed: [0, 1]}}"
    (row,) = spec_of(tmp_path, table(rows=rows)).rows
    assert row.where == {"method": ["neo"], "seed": [0, 1]}


def test_a_list_that_is_a_value_stands_in_a_list(tmp_path):
    rows = "{label: A, where: {lora.target_modules: [[q_proj, v_proj], all-linear]}}"
    (row,) = spec_of(tmp_path, table(rows=rows)).rows
    assert row.where == {"lora.target_modules": [["q_proj", "v_proj"], "all-linear"]}


COMPARED = "{metric: val/ce, compare: true}"


def test_a_baseline_a_choice_and_what_a_column_shows_are_read(tmp_path):
    (tmp_path / "more.md").write_text("# More\n", encoding="utf-8")
    columns = "{metric: val/ce, compare: true, range: true}, {config: optim.lr, label: lr}"
    more = (
        "baseline: Neo\ninterval: bootstrap\n"
        "choose: {by: lora, key: optim.lr, metric: val/kd}\ninclude: more.md\n"
        "figures: [{kind: seeds, x: val/ce}]"
    )
    spec = spec_of(tmp_path, table(columns=columns, more=more))
    assert (spec.baseline, spec.interval, spec.included) == ("Neo", "bootstrap", "# More\n")
    assert (spec.choose.by, spec.choose.key, spec.choose.metric) == ("lora", "optim.lr", "val/kd")
    ce, lr = spec.columns
    assert (ce.source, ce.compare, ce.range) == ("metric", True, True)
    assert (lr.source, lr.key, lr.header, lr.better) == ("config", "optim.lr", "lr", None)
    assert spec.figures[0].x == ["val/ce"]


WRONG = [
    (table(more="tittle: x"), r"'tittle' is unknown; did you mean 'title'"),
    (table(more="title: again"), "duplicate key"),
    (f"rows: [{ROW}]\ncolumns: [{COLUMN}]", "'title' is missing"),
    ("[]", "not a mapping"),
    ("title: [", "table.yaml"),
    (table(rows=""), "rows: there is none"),
    (table(columns=""), "columns: there is none"),
    (table(rows="{label: A}"), r"'rows\[0\]\.where' is missing"),
    (table(rows="{label: A, where: {}}"), r"rows\[0\]\.where: names nothing"),
    (table(rows="{label: A, where: {m: 1}, refernce: true}"), "did you mean 'reference'"),
    (table(rows="{label: 3, where: {m: 1}}"), r"'rows\[0\]\.label' is 3, not of type str"),
    (table(rows=f"{ROW}, {ROW}"), "rows: Neo stands there more than once"),
    (
        table(rows="{label: A, where: {m: 1}, paper: {val/kd: 1}}"),
        "'val/kd' is no column; legal: val/ce",
    ),
    (
        table(rows="{label: A, where: {m: 1}, paper: {val/ce: x}}"),
        r"paper\.val/ce: 'x' is not a number",
    ),
    (table(columns="{metric: val/cee}"), r"columns\[0\]: unknown metric 'val/cee'"),
    (table(columns="{field: val/ce}"), r"columns\[0\]: unknown record field"),
    (table(columns="{metric: val/ce, field: seconds}"), "both 'metric' and 'field'"),
    (table(columns="{field: seconds, config: seed}"), "both 'field' and 'config'"),
    (table(columns="{config: optim.lr, unit: x}"), r"'columns\[0\]\.unit' is unknown"),
    (table(columns="{config: optim.lr, compare: true}"), r"'columns\[0\]\.compare' is unknown"),
    (table(columns="{metric: val/ce, range: 1}"), "range' is 1, not of type bool"),
    (table(columns=COMPARED), "val/ce has 'compare', but there is no 'baseline'"),
    (table(more="baseline: Neo"), "no column has 'compare: true'"),
    (
        table(columns=COMPARED, more="baseline: LoRA"),
        "baseline: 'LoRA' is no competing row; legal: Neo",
    ),
    (
        table(
            rows=f"{ROW}, {{label: B, where: {{m: 1}}, reference: true}}",
            columns=COMPARED,
            more="baseline: B",
        ),
        "baseline: 'B' is no competing row; legal: Neo",
    ),
    (
        table(
            rows="{label: A, where: {m: 1}, group: g}, {label: B, where: {m: 2}, group: h}",
            columns=COMPARED,
            more="baseline: A",
        ),
        "'A' is no competing row of group 'h'; legal: B",
    ),
    (
        table(columns=COMPARED, more="baseline: Neo\ninterval: normal"),
        "interval: 'normal', legal: t, bootstrap",
    ),
    (table(more="interval: bootstrap"), "interval: .* there is no 'baseline'"),
    (table(more="choose: {by: lora, key: optim.lr}"), r"'choose\.metric' is missing"),
    (table(more="choose: [lora]"), "'choose' is .*, not of type dict"),
    (
        table(more="choose: {by: lora, key: optim.lr, metric: val/kd, seeds: 2}"),
        r"'choose\.seeds' is unknown; legal: by, key, metric",
    ),
    (
        table(more="choose: {by: lora, key: lora, metric: val/kd}"),
        r"choose\.key: 'lora' is what 'by' names",
    ),
    (
        table(more="choose: {by: lora, key: optim.lr, metric: val/kdd}"),
        r"choose\.metric: unknown metric 'val/kdd'",
    ),
    (
        table(more="choose: {by: lora, key: optim.lr, metric: train/lr}"),
        r"choose\.metric: train/lr has no better end",
    ),
    (table(more="include: ../more.md"), r"include: '\.\./more\.md' is not there"),
    (table(columns="{metric: val/ce, scale: 1000}"), r"scale: .*'unit' must be given"),
    (table(columns="{metric: val/ce, better: more}"), "better: 'more', legal: higher, lower, null"),
    (table(columns="{metric: val/ce, decimals: -1}"), "decimals: -1 is negative"),
    (table(columns="{metric: val/ce, decimals: true}"), "decimals' is True, not of type int"),
    (table(columns=f"{COLUMN}, {COLUMN}"), "columns: val/ce stands there more than once"),
    (table(more="figures: [{kind: pie, x: val/ce}]"), r"figures\[0\].kind: 'pie', legal: bars"),
    (table(more="figures: [{kind: bars, x: [val/cee]}]"), r"figures\[0\]: unknown metric"),
    (table(more="figures: [{kind: bars, x: [val/ce, val/agreement]}]"), "bars share one axis"),
    (table(more="figures: [{kind: bars, x: val/ce, y: val/kd}]"), "bars have none"),
    (table(more="figures: [{kind: scatter, x: seconds}]"), "scatter need one x and one y"),
    (table(more="figures: [{kind: seeds, x: val/ce, y: val/kd}]"), "seeds need one x and no y"),
    (table(more="figures: [{kind: seeds, x: [val/ce, val/kd]}]"), "seeds need one x and no y"),
    (table(more="figures: [{kind: seeds}]"), "seeds need one x and no y"),
    (table(more="figures: [{kind: seeds, x: 'val/ce/*'}]"), r"unknown metric 'val/ce/\*'"),
    (table(more="figures: [{kind: curves, x: epoch, y: val/kd}]"), "legal for curves: step"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_table_yaml_is_refused_naming_file_and_key(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as refused:
        spec_of(tmp_path, text)
    assert "table.yaml" in str(refused.value)


def test_a_table_yaml_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"table\.yaml: no such file"):
        read_table_spec(tmp_path / "table.yaml")
