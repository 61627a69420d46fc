import re
import shutil
import subprocess
from pathlib import Path

import pytest
from example_runs import example_run
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neo.results.latex import escape, render_latex
from neo.results.row_spec import RowSpec
from neo.results.table_spec import ColumnSpec, TableSpec
from neo.results.tables import build_table

SPECIAL = "\\~^`<>|&%$#_{}"
CE = ColumnSpec(
    key="val/ce", source="metric", label="val_ce", unit="%", decimals=2, better="lower", scale=1.0
)
COMMITTED = sorted((Path(__file__).parents[1] / "experiments").glob("*/table.tex"))


def row(label, **changes):
    return RowSpec(**({"label": label, "where": {"method": [label]}} | changes))


def table_of(values, rows=None, columns=(CE,), more=(), **changes):
    """A table whose row `method` has `values[method]`, a number per seed."""
    records = [
        example_run(
            method, seed, started_at="2026-01-01T00:00:00Z", metrics={c.key: x for c in columns}
        )
        for method, numbers in values.items()
        for seed, x in enumerate(numbers)
    ]
    spec = TableSpec(
        **({"title": "T", "rows": rows or [row(m) for m in values], "columns": list(columns)})
        | changes
    )
    return build_table(spec, [*records, *more])


def without_comments(text):
    """The source as LaTeX reads it: what follows a bare % is gone."""
    return "\n".join(re.sub(r"(?<!\\)((?:\\\\)*)%.*", r"\1", line) for line in text.splitlines())


def floats(text):
    """Per float: label, column letters and the cells of every row, read without our code."""
    stack, found = [], []
    for line in without_comments(text).splitlines():
        for verb, name in re.findall(r"\\(begin|end)\{(\w+)\}", line):
            if verb == "begin":
                stack.append(name)
                if name == "table":
                    found.append({"label": "", "letters": "", "rows": []})
            else:
                assert stack.pop() == name
        if match := re.search(r"\\label\{(.*)\}", line):
            found[-1]["label"] = match[1]
        if match := re.search(r"\\begin\{tabular\}\{(\w+)\}", line):
            found[-1]["letters"] = match[1]
        if line.endswith(r"\\"):
            assert stack[-1] == "tabular"
            assert not line.lstrip().startswith(("[", "*"))
            found[-1]["rows"].append(
                [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]
            )
    assert not stack
    assert found
    for one in found:
        assert {len(cells) for cells in one["rows"]} == {len(one["letters"])}
    return found


def check_characters(text):
    """No character has a meaning for LaTeX that it was not given on purpose."""
    body = without_comments(text)
    bare = re.sub(r"\\label\{[\w:-]*\}", "", body)  # a name, which LaTeX does not print
    bare = re.sub(r"\\(?:[A-Za-z]+|.)", "", bare)  # every command, and every escaped character
    assert not set(bare) & set("#_^~\\"), bare
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    tabulars = re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", body, re.DOTALL)
    assert bare.count("&") == sum(len(re.findall(r"(?<!\\)&", one)) for one in tabulars)


DECODED = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
    r"\textasciigrave{}": "`", r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|",
    r"\&": "&", r"\%": "%", r"\$": "$", r"\#": "#", r"\_": "_", r"\{": "{", r"\}": "}",
    "{}": "", r"$\pm$": "±", r"\textemdash{}": "—", r"$\alpha$": "\u03b1", r"$\omega$": "ω",
    r"$\uparrow$": "↑",
}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=SPECIAL + "±—\u03b1ω↑ab c-'\n", max_size=12))
@example(text="\\{}%$#&_^~`<>|")
def test_an_escaped_text_reads_back_as_it_was(text):
    escaped = escape(text)
    tokens = re.compile("|".join(re.escape(token) for token in sorted(DECODED, key=len)[::-1]))
    left = tokens.sub("", escaped)
    assert not set(left) & set(SPECIAL)
    assert tokens.sub(lambda match: DECODED[match[0]], escaped) == " ".join(text.split())
    assert "--" not in escaped
    assert "''" not in escaped


NASTY = "50 % of a_b & {c} #1 $2 ~ ^ \\x <y> |z| `q` -- ± — \u03b1"


def nasty():
    """A table with every special character in every place that a user fills."""
    failed = example_run("bad", 2, status="oom", error=f"[{NASTY}]")
    groups = ["", NASTY, NASTY, "* other"]
    labels = ["[one]", "* two", NASTY, "base"]
    rows = [row(x, group=g, where={"method": ["bad"]}) for x, g in zip(labels, groups, strict=True)]
    config = ColumnSpec(
        key="loss.name", source="config", label=NASTY, unit="", decimals=0, better=None, scale=1.0
    )
    records = [
        example_run("bad", seed, config={"loss": {"name": NASTY}}, metrics={"val/ce": -1.5 - seed})
        for seed in range(2)
    ]
    spec = TableSpec(
        title=NASTY, note=NASTY, group_label=NASTY, rows=rows, columns=[CE, config], command=NASTY
    )
    return build_table(spec, [*records, failed])


def test_every_special_character_is_escaped_wherever_a_user_may_put_it():
    text = render_latex(nasty(), f"a/{NASTY}", notes=["* " + NASTY])
    (found,) = floats(text)
    check_characters(text)
    assert len(found["rows"]) == 5
    assert re.fullmatch(r"tab:[\w-]+", found["label"])
    assert "$-$2.00 $\\pm$ 0.71" in text


def test_all_that_precedes_the_float_is_a_comment():
    text = render_latex(nasty(), "x").splitlines()
    start = text.index(r"\begin{table}")
    assert start > 3
    assert all(line.startswith("% ") for line in text[:start])


GOOD, BAD = [1.0, 1.2, 1.1, 0.9], [2.0, 2.1, 2.2, 1.9]


def test_the_cells_are_those_of_the_other_formats_the_best_one_bold():
    (found,) = floats(render_latex(table_of({"neo": GOOD, "kd": BAD}), "mini_x"))
    assert found["label"] == "tab:mini_x"
    assert found["letters"] == "lrr"
    assert found["rows"] == [
        ["", "n", r"val\_ce (\%) $\downarrow$"],
        ["neo", "4", r"\textbf{1.05 $\pm$ 0.13}"],
        ["kd", "4", r"2.05 $\pm$ 0.13"],
    ]


def test_a_group_is_named_once_and_parted_by_a_rule_and_a_reference_is_slanted():
    rows = [
        row("neo", group="a"),
        row("kd", group="a"),
        row("lora", group="b"),
        row("teacher", reference=True),
    ]
    values = {"neo": GOOD, "kd": BAD, "lora": BAD, "teacher": [0.1]}
    text = render_latex(table_of(values, rows, group_label="rows"), "x")
    (found,) = floats(text)
    assert found["letters"] == "llrr"
    assert [cells[:2] for cells in found["rows"][1:]] == [
        ["a", "neo"],
        ["", "kd"],
        ["b", "lora"],
        ["", r"\emph{teacher}"],
    ]
    assert text.count(r"\midrule") == 3
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1


def test_a_baseline_has_a_second_float_with_its_own_label():
    compared = ColumnSpec(**(vars(CE) | {"compare": True}))
    table = table_of({"base": BAD, "neo": GOOD}, columns=[compared], baseline="base")
    first, second = floats(render_latex(table, "x"))
    assert (first["label"], second["label"]) == ("tab:x", "tab:x-against")
    ((label, n, difference, p),) = second["rows"][1:]
    assert (label, n) == ("neo", "4")
    assert difference.startswith(r"\textbf{$-$1.00} [$-$")
    assert p == r"\textless{}0.001"


def test_runs_that_did_not_finish_are_counted_and_named():
    more = [example_run("neo", 7, status="diverged", error="loss is nan_1")]
    text = render_latex(table_of({"neo": GOOD}, more=more), "x")
    (found,) = floats(text)
    assert found["rows"][1][1] == "4 (1 diverged)"
    assert r"Runs that did not finish: neo, seed 7, run neo7: diverged (loss is nan\_1)." in text


def test_code_in_a_note_is_set_as_code():
    text = render_latex(table_of({"neo": GOOD}, note="By `make a_b` and `c`, not `"), "x")
    assert r"By \texttt{make a\_b} and \texttt{c}, not \textasciigrave{}" in text


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_a_committed_table_is_sound(path):
    text = path.read_text(encoding="utf-8")
    assert floats(text)
    check_characters(text)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_sets_every_table(tmp_path):
    (tmp_path / "nasty.tex").write_text(render_latex(nasty(), "x", ["* " + NASTY]))
    inputs = "\n".join(rf"\input{{{path}}}" for path in [tmp_path / "nasty.tex", *COMMITTED])
    (tmp_path / "doc.tex").write_text(
        "\\documentclass{article}\n\\usepackage[T1]{fontenc}\n\\usepackage{booktabs,graphicx}\n"
        f"\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "doc.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "doc.pdf").stat().st_size > 10_000
    assert "Overfull" not in done.stdout
