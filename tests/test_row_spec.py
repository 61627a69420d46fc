import pytest

from neo.results.table_spec import read_table_spec

COLUMNS = "columns: [{metric: eval/arc/acc}, {metric: val/ce}, {field: seconds}, {config: seed}]"
NEO = "{label: Neo, where: {method: neo}}"


def spec_of(tmp_path, *rows, more=""):
    path = tmp_path / "table.yaml"
    path.write_text(f"title: T\nrows: [{', '.join(rows)}]\n{COLUMNS}\n{more}\n", encoding="utf-8")
    return read_table_spec(path)


def quoted(numbers, more="source: a card"):
    return f"{{label: Q, quoted: {{{numbers}}}, {more}}}"


def test_a_quoted_row_has_its_numbers_and_its_source_and_competes_with_none(tmp_path):
    row, other = spec_of(tmp_path, quoted("eval/arc/acc: 0.36, val/ce: null, seconds: 3"), NEO).rows
    assert row.quoted == {"eval/arc/acc": 0.36, "val/ce": None, "seconds": 3}
    assert (row.source, row.where, row.reference, row.is_quoted) == ("a card", {}, True, True)
    assert (other.is_quoted, other.reference, other.pending) == (False, False, False)


def test_a_row_may_say_that_it_waits_for_its_runs(tmp_path):
    (row,) = spec_of(tmp_path, "{label: Neo, where: {method: neo}, pending: true}").rows
    assert row.pending


WRONG = [
    (quoted("eval/arc/acc: 0.3", "group: ''"), r"'rows\[0\]\.source' is missing"),
    (quoted("eval/arc/acc: 0.3", "source: ' '"), r"rows\[0\]\.source: is empty"),
    (quoted(""), r"rows\[0\]\.quoted: names no number"),
    (quoted("eval/arc/acc: 36.43"), r"quoted\.eval/arc/acc: 36\.43 is no share from 0 to 1"),
    (quoted("eval/arc/acc: -0.1"), "no share from 0 to 1"),
    (quoted("eval/arc/acc: high"), "'high' is not a number; null where"),
    (quoted("eval/arc/acc: true"), "True is not a number"),
    (quoted("val/ce: .nan"), "nan is not a number"),
    (quoted("val/cee: 1"), r"quoted\.val/cee: unknown metric 'val/cee': did you mean"),
    (quoted("seed: 1"), r"quoted\.seed: unknown metric"),
    (quoted("val/kd: 1"), r"rows\[0\]\.quoted: 'val/kd' is no column; legal: eval/arc/acc"),
    (quoted("val/ce: 1", "source: s, where: {method: neo}"), "'where' and 'quoted'"),
    (quoted("val/ce: 1", "source: s, pending: true"), r"'rows\[0\]\.pending' is unknown"),
    ("{label: A, where: {method: neo}, source: s}", r"'rows\[0\]\.source' is unknown"),
    ("{label: A, where: {method: neo}, pending: soon}", "pending' is 'soon', not of type bool"),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_a_wrong_row_is_refused_naming_its_place(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        spec_of(tmp_path, row)


def test_a_table_of_groups_is_not_turned(tmp_path):
    assert spec_of(tmp_path, NEO, more="transpose: true").transpose
    with pytest.raises(ValueError, match="transpose: a table of groups"):
        spec_of(tmp_path, "{label: A, where: {method: neo}, group: g}", more="transpose: true")
