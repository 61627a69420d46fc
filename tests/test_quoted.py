"""Quoted rows, rows that wait and turned tables, in every format."""

import csv
import io
import re

import pytest
from example_runs import example_run

from neo.report import main
from neo.results.cells import grid
from neo.results.latex import render_latex
from neo.results.markdown import render_markdown
from neo.results.page import render_page
from neo.results.printing import MISSING
from neo.results.records import write_record
from neo.results.row_spec import RowSpec
from neo.results.table_csv import render_csv
from neo.results.table_spec import ColumnSpec, TableSpec
from neo.results.tables import build_table

ACC = ColumnSpec(
    key="eval/arc/acc", source="metric", label="ARC", unit="%", decimals=2, better="higher",
    scale=100.0, range=True,
)  # fmt: skip
CE = ColumnSpec(
    key="val/ce", source="metric", label="ce", unit="", decimals=1, better="lower", scale=1.0
)
CARD = RowSpec(
    label="Card",
    quoted={"eval/arc/acc": 0.3643, "val/ce": None},
    source="the card of M",
    reference=True,
)
NEO = RowSpec(label="Neo", where={"method": ["neo"]})
LORA = RowSpec(label="LoRA", where={"method": ["lora"]}, pending=True)


def table_of(*rows, transpose=False, values=None, **changes):
    values = {"neo": (0.30, 0.31, 0.32)} if values is None else values
    records = [
        example_run(method, seed, metrics={"eval/arc/acc": x})
        for method, numbers in values.items()
        for seed, x in enumerate(numbers)
    ]
    spec = TableSpec(title="T", rows=list(rows), columns=[ACC, CE], transpose=transpose, **changes)
    return build_table(spec, records)


def grid_of(text):
    """The cells of the first Markdown table, without the line under its head."""
    lines = [line for line in text.partition("\n\nMean")[0].splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [found[0], *found[2:]]


def test_a_quoted_row_is_in_italics_without_n_or_deviation_and_names_its_source():
    text = render_markdown(table_of(CARD, NEO))
    assert grid_of(text)[1] == ["*Card*", MISSING, "*36.43*", MISSING]
    assert grid_of(text)[2][:2] == ["Neo", "3"]
    assert "Quoted and not measured here: Card; from the card of M; not given of Card: ce." in text
    plain = render_markdown(table_of(NEO))
    assert "uoted" not in plain


def test_rows_of_one_source_are_named_together_and_another_source_by_itself():
    more = [
        RowSpec(label=name, quoted={"val/ce": 1.0}, source=source, reference=True)
        for name, source in (("B", "the card of M"), ("C", "a paper"))
    ]
    text = render_markdown(table_of(CARD, *more, NEO))
    assert "not measured here: Card; B; from the card of M;" in text
    assert "Quoted and not measured here: C; from a paper." in text


def test_a_quoted_row_takes_no_run_and_never_wins():
    high = RowSpec(label="High", quoted={"eval/arc/acc": 0.99}, source="s", reference=True)
    values = {"neo": (0.50, 0.51, 0.52), "lora": (0.300, 0.311, 0.319)}
    table = table_of(high, NEO, LORA, values=values)
    assert table.best(ACC) == {1}
    assert [len(row.runs) for row in table.rows] == [0, 3, 3]
    assert [run.run_id for run in table_of(high, NEO, values=values).unmatched] == [
        "lora0", "lora1", "lora2"
    ]  # fmt: skip


def test_the_csv_has_a_quoted_number_in_its_recorded_unit_with_its_source():
    first, second = csv.DictReader(io.StringIO(render_csv(table_of(CARD, NEO))))
    assert (first["eval/arc/acc"], first["source"]) == ("0.3643", "the card of M")
    empty = ("n", "not_finished", "eval/arc/acc_std", "eval/arc/acc_n", "eval/arc/acc_low")
    assert {first[key] for key in empty} == {""}
    assert (second["n"], second["source"]) == ("3", "")
    assert "source" not in render_csv(table_of(NEO)).splitlines()[0]


def test_latex_and_page_mark_quoted_numbers_and_name_the_source():
    for transpose in (False, True):
        table = table_of(CARD, NEO, transpose=transpose)
        tex, page = render_latex(table, "card"), render_page(table, [], {})
        assert all(text in tex for text in (r"\emph{36.43}", r"\emph{Card}", "from the card of M"))
        assert all(text in page for text in ("<em>36.43</em>", "<em>Card</em>", "the card of M"))


def test_a_turned_table_is_the_same_one_read_the_other_way():
    rows = (CARD, NEO, LORA)
    upright, turned = (grid(table_of(*rows, transpose=turn)) for turn in (False, True))
    as_lines = [upright[0], *upright[1]]
    assert [turned[0], *turned[1]] == [list(line) for line in zip(*as_lines, strict=True)]
    text = render_markdown(table_of(*rows, transpose=True))
    assert grid_of(text)[0] == ["", "*Card*", "Neo", "LoRA"]
    assert grid_of(text)[1] == ["n", MISSING, "3", "0"]
    assert "Columns in italics" in text
    assert "better than every other column of its line" in text


def test_a_turned_csv_has_the_same_cells():
    rows = (CARD, NEO, LORA)
    upright = list(csv.DictReader(io.StringIO(render_csv(table_of(*rows)))))
    head, *lines = csv.reader(io.StringIO(render_csv(table_of(*rows, transpose=True))))
    assert head == ["row", "Card", "Neo", "LoRA"]
    turned = {key: cells for key, *cells in lines}
    assert turned == {
        key: [line[key] for line in upright] for key in upright[0] if key not in ("group", "row")
    }


def test_turned_latex_and_page_have_a_line_for_each_metric():
    table = table_of(CARD, NEO, transpose=True)
    tex = render_latex(table, "card")
    assert r"\begin{tabular}{lrr}" in tex
    assert r"ARC (\%) $\uparrow$ & \emph{36.43} & 31.00" in tex
    page = render_page(table, [], {})
    head = re.search(r"<thead><tr>(.*?)</tr></thead>", page)[1]
    assert re.findall(r"<th[^>]*>(.*?)</th>", head) == ["", "<em>Card</em>", "Neo"]
    assert '<th scope="row" class="stick">ARC<small>% ↑</small></th>' in page


def test_a_bold_rule_stands_only_where_two_rows_compete():
    assert "Bold:" not in render_markdown(table_of(CARD, NEO))
    assert "Bold:" in render_markdown(table_of(CARD, NEO, LORA))


TABLE = """
title: A card
transpose: true
rows:
  - {label: Card, quoted: {eval/arc/acc: 0.3643}, source: a card}
  - {label: Neo, where: {WHERE}, pending: true}
columns: [{metric: eval/arc/acc, label: ARC}]
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "card"
    folder.mkdir(parents=True)

    def write(where="method: neo", text=TABLE):
        (folder / "table.yaml").write_text(text.replace("WHERE", where))
        return folder

    return write


def test_a_table_whose_rows_wait_is_rendered_and_checked_without_a_record(written, capsys):
    folder = written()
    assert main(["card"]) == 0
    assert "Not run yet: Neo." in capsys.readouterr().out
    assert grid_of((folder / "table.md").read_text()) == [
        ["", "*Card*", "Neo"], ["n", MISSING, "0"], ["ARC (%) ↑", "*36.4*", MISSING]
    ]  # fmt: skip
    assert (folder / "report.html").is_file()
    assert main(["card", "check=true"]) == 0
    (folder / "table.tex").write_text("edited")
    assert main(["card", "check=true"]) == 1


def test_a_row_that_waits_is_filled_by_its_runs(written):
    folder = written()
    write_record(example_run("neo", 0, metrics={"eval/arc/acc": 0.4}), folder / "results" / "a")
    assert main(["card"]) == 0
    text = (folder / "table.md").read_text()
    assert grid_of(text)[1:] == [["n", MISSING, "1"], ["ARC (%) ↑", "*36.4*", "40.0"]]
    assert "Not run yet" not in text


REFUSED = [
    ("method: neo", TABLE.replace(", pending: true", ""), "rows[1] (Neo): there is no record yet"),
    ("methd: neo", TABLE, "'methd', no group or key; did you mean 'method'?"),
    ("method: noe", TABLE, "'noe', no choice of method; did you mean 'neo'?"),
    ("student: llama3_2_1, seed: 0", TABLE, "did you mean 'llama3_2_1b'?"),
    ("los.kd_ratio: 0.9", TABLE, "'los.kd_ratio', no group or key"),
]


@pytest.mark.parametrize(("where", "text", "message"), REFUSED)
@pytest.mark.parametrize("arguments", [["card"], ["card", "check=true"]])
def test_a_row_that_does_not_wait_or_waits_for_what_cannot_come_is_refused(
    written, capsys, where, text, message, arguments
):
    written(where, text)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_misspelt_key_is_refused_beside_records_though_the_row_waits(written, capsys):
    folder = written("methd: neo")
    write_record(example_run("neo", 0, metrics={"eval/arc/acc": 0.4}), folder / "results" / "a")
    assert main(["card"]) == 2
    assert "no record has a choice or a config key 'methd'" in capsys.readouterr().err
