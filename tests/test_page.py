import base64
import functools
import hashlib
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_runs import example_run
from hypothesis import given
from hypothesis import strategies as st

from neo.results.cells import against_lines, headers, lines
from neo.results.page import PARTS, embedded, render_page
from neo.results.page_curves import (
    FEWEST_POINTS,
    MAX_POINTS,
    MOST_POINTS,
    points_per_curve,
    read_curves,
    thin,
)
from neo.results.page_data import Setting, settings
from neo.results.printing import number
from neo.results.records import find_records, read_record
from neo.results.table_spec import read_table_spec
from neo.results.tables import build_table

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\u2028\u2029&amp;'\"$title`"
TABLE = """
title: Methods
command: make demo
note: What was done.
rows:
  - {label: SFT, where: {method: sft}}
  - {label: Neo, where: {method: neo}}
columns:
  - {metric: eval/mini/exact_match, label: exact match}
  - {metric: val/kd}
"""
VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes and text; refuses unbalanced tags."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.problems = [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert not self.problems

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.problems.append(tag)
        else:
            self.open.pop()

    def handle_data(self, text):
        for element in self.open:
            element[2].append(text)

    def handle_comment(self, text):
        self.problems.append(f"comment {text}")

    def texts(self, tag, **wanted):
        return [
            "".join(text)
            for name, attrs, text in self.elements
            if name == tag and wanted.items() <= attrs.items()
        ]

    @property
    def data(self):
        (text,) = self.texts("script", type="application/json")
        return json.loads(text)


def table_of(tmp_path, runs, text=TABLE):
    (tmp_path / "table.yaml").write_text(text, encoding="utf-8")
    return build_table(read_table_spec(tmp_path / "table.yaml"), runs)


def page_of(tmp_path, runs, curves=None, text=TABLE, **options):
    return render_page(table_of(tmp_path, runs, text), runs, curves or {}, **options)


def log_of(tmp_path, text, name="metrics.csv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def four_runs():
    return [
        example_run(m, s, metrics={"eval/mini/exact_match": 0.25 + s / 7, "val/kd": 1 / 3})
        for m in ("sft", "neo")
        for s in range(2)
    ]


@functools.cache
def committed(name):
    found = [(path, read_record(path)) for path in find_records(EXPERIMENTS / name)]
    table = build_table(read_table_spec(EXPERIMENTS / name / "table.yaml"), [r for _, r in found])
    return table, [r for _, r in found], {r.run_id: path.with_suffix(".csv") for path, r in found}


def records_in(data):
    """What the page's script does to the data: records as they were, by run id."""
    found = {}
    for run in data["runs"]:
        record = dict(run["own"])
        record |= {name: data["pool"][i] for name, i in run["shared"].items()}
        record["config"] = {name: data["pool"][i] for name, i in run["config"].items()}
        pairs = zip(data["metric_names"], run["metrics"], strict=True)
        record["metrics"] = {name: value for name, value in pairs if value is not None}
        found[record["run_id"]] = record
    return found


def as_json(record):
    return json.dumps(record, sort_keys=True)


def test_every_record_is_in_the_page_with_all_its_fields_and_digits():
    table, records, curves = committed("variants_search")
    found = records_in(Page(render_page(table, records, curves)).data)
    assert len(found) == len(records) == 130
    for run in records:
        assert as_json(found[run.run_id]) == as_json(json.loads(run.to_json()))


def test_values_that_python_calls_equal_are_kept_apart(tmp_path):
    configs = [{"a": v, "b": {"c": v}} for v in (True, 1, 1.0, "1", None, {}, [])]
    runs = [
        example_run("neo", 0, run_id=f"r{i}", status="failed", config=config)
        for i, config in enumerate(configs)
    ]
    found = records_in(Page(page_of(tmp_path, [example_run("sft"), *runs])).data)
    for run in runs:
        assert as_json(found[run.run_id]["config"]) == as_json(run.config)


def test_a_page_is_made_of_balanced_tags_and_names_its_encoding_first(tmp_path):
    text = page_of(tmp_path, four_runs())
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert text.index('<meta charset="utf-8">') < 200
    assert page.texts("title") == ["Methods"]


def test_nothing_in_a_record_or_a_table_can_leave_its_place(tmp_path):
    table = json.loads(
        json.dumps({"title": HOSTILE, "note": HOSTILE, "command": HOSTILE, "group_label": HOSTILE})
    ) | {
        "rows": [{"label": HOSTILE, "group": HOSTILE, "where": {"method": "neo"}}],
        "columns": [{"metric": "val/kd", "label": HOSTILE, "unit": HOSTILE}],
    }
    runs = [
        example_run(
            "neo",
            status="failed",
            error=HOSTILE,
            config={HOSTILE: HOSTILE},
            choices={"method": "neo", "data": HOSTILE},
            overrides=[HOSTILE],
            argv=[HOSTILE],
            device=HOSTILE,
            versions={"torch": HOSTILE},
            commit=HOSTILE,
        ),
        example_run("kd", 1),
    ]
    text = page_of(tmp_path, runs, text=json.dumps(table), notes=[HOSTILE])
    page = Page(text)
    assert [tag for tag, _, _ in page.elements if tag in ("img", "script")] == ["script"] * 2
    assert as_json(records_in(page.data)["neo0"]) == as_json(json.loads(runs[0].to_json()))
    assert page.texts("h1") == [HOSTILE]
    assert page.texts("pre")[0] == HOSTILE
    between = re.search('<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert not set("<>&\u2028\u2029") & set(between[1])


@given(st.recursive(st.text() | st.integers() | st.booleans() | st.none(), st.lists))
def test_embedded_data_reads_back_and_has_no_mark_of_html(value):
    text = embedded(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_the_page_may_run_its_own_script_and_style_and_load_nothing(tmp_path):
    page = Page(page_of(tmp_path, four_runs()))
    (policy,) = [
        attrs["content"]
        for tag, attrs, _ in page.elements
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    script, style = page.texts("script")[1], page.texts("style")[0]
    for rule, text in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    for tag, attrs, _ in page.elements:
        assert not {"src", "href", "style", "srcset", "action"} & set(attrs), tag
        assert not [name for name in attrs if name.startswith("on")], tag
    assert not re.search(r"url\(|@import|expression", style)
    assert "innerHTML" not in script
    # A namespace is a name; nothing is fetched from it.
    assert re.findall(r"\w+://[^\s\"']*", script + style) == ["http://www.w3.org/2000/svg"]


def test_the_same_records_give_the_same_bytes_in_whatever_order_they_come(tmp_path):
    runs = four_runs()
    curves = {r.run_id: log_of(tmp_path, "step,val/kd\n1,0.5\n2,0.25\n") for r in runs}
    first = page_of(tmp_path, runs, curves)
    for order in itertools.permutations(runs):
        assert page_of(tmp_path, list(order), dict(reversed(curves.items()))) == first


def test_runs_that_failed_or_match_no_row_are_there_with_their_reason(tmp_path):
    runs = [
        *four_runs(),
        example_run("neo", 2, status="oom", error="CUDA out of memory"),
        example_run("kd", 0),
    ]
    page = Page(page_of(tmp_path, runs))
    by_id = {run["own"]["run_id"]: run for run in page.data["runs"]}
    assert set(by_id) == {run.run_id for run in runs}
    assert by_id["neo2"]["own"]["error"] == "CUDA out of memory"
    assert by_id["neo2"]["rows"] == ["Neo"]
    assert by_id["kd0"]["rows"] == []
    (facts,) = page.texts("p", **{"class": "facts"})
    assert facts == "6 runs · 5 ok · 1 oom · 1 in no row of the table · experiment mini"


def test_runs_stand_in_the_order_of_the_rows_then_of_their_seeds(tmp_path):
    runs = [*reversed(four_runs()), example_run("kd", 0)]
    order = [run["own"]["run_id"] for run in Page(page_of(tmp_path, runs)).data["runs"]]
    assert order == ["sft0", "sft1", "neo0", "neo1", "kd0"]


@pytest.mark.parametrize("runs", [[], [example_run()]], ids=["none", "one"])
def test_a_page_without_runs_or_curves_is_a_page(tmp_path, runs):
    page = Page(page_of(tmp_path, runs))
    assert len(page.data["runs"]) == len(runs)
    assert page.data["curve_names"] == []
    assert page.data["curves"] == [{}] * len(runs)


@pytest.mark.parametrize("name", ["variants", "variants_search", "mini", "mini_search"])
def test_the_tables_over_seeds_have_the_text_of_the_rendered_ones(name):
    table, records, curves = committed(name)
    page = Page(render_page(table, records, curves))
    cells = [cell for line in lines(table) for cell in line]
    if table.spec.baseline:
        cells += [cell for line in against_lines(table)[1] for cell in line]
    bare = [cell.text + cell.rest for cell in cells]
    body = [
        "".join(text)
        for tag, attrs, text in page.elements
        if tag == "td" or (tag == "th" and attrs["scope"] == "row")
    ]
    assert body == bare
    shown = [re.sub(r"[ ()]", "", text) for text in page.texts("th", scope="col")]
    wanted = headers(table) + (against_lines(table)[0] if table.spec.baseline else [])
    assert shown == [re.sub(r"[ ()]", "", text) for text in wanted]
    assert page.texts("strong") == [cell.text for cell in cells if cell.bold]
    assert page.texts("em") == [cell.text for cell in cells if cell.italic]


def test_origin_names_command_code_device_and_versions(tmp_path):
    run = example_run(
        commit="0123456789", dirty=True, device="cpu: some, 2 cores", versions={"torch": "2.13"}
    )
    items = Page(page_of(tmp_path, [run])).texts("li")
    assert items == [
        "Command: make demo",
        "Code: 0123456 with local changes",
        "Runs: 1, started 2026-01-01T00:00:00Z to 2026-01-01T00:00:00Z",
        "Device: cpu: some, 2 cores",
        "Versions: torch 2.13",
    ]


def test_the_columns_are_settings_then_the_tables_numbers_then_costs(tmp_path):
    runs = [
        example_run("neo", s, metrics={"eval/mini/exact_match": 0.5}, seconds=3.0, num_tokens=7)
        for s in range(2)
    ] + [example_run("sft", 0)]
    columns = Page(page_of(tmp_path, runs)).data["columns"]
    assert [column["label"] for column in columns] == [
        "run", "status", "method", "seed", "exact match", "val/kd", "tokens", "time"
    ]  # fmt: skip
    by_label = {column["label"]: column for column in columns}
    match = by_label["exact match"]
    assert (match["unit"], match["decimals"], match["scale"]) == ("% ↑", 1, 100.0)
    assert match["path"] == ["metrics", "eval/mini/exact_match"]
    assert (by_label["time"]["unit"], by_label["time"]["path"]) == ("s", ["seconds"])
    assert by_label["tokens"]["unit"] == ""  # the label says it


def test_a_number_that_the_table_shows_is_not_there_twice(tmp_path):
    text = TABLE + "  - {metric: perf/peak_mem_gib, label: memory}\n  - {field: seconds}\n"
    run = example_run(seconds=1.0, peak_memory_gib=2.0, metrics={"perf/peak_mem_gib": 2.0})
    labels = [c["label"] for c in Page(page_of(tmp_path, [run], text=text)).data["columns"]]
    assert labels.count("memory") == labels.count("seconds") == 1
    assert not {"time", "peak memory"} & set(labels)


def varied(lora, r=16, lr=0.1, overrides=()):
    return example_run(
        choices={"data": "mini", "lora": lora},
        config={"optim": {"lr": lr}, "lora": {"r": r, "use_dora": lora == "dora"}, "seed": r},
        overrides=list(overrides),
    )


LORA = Setting("lora", ("choices", "lora"))
RANK = Setting("lora.r", ("config", "lora", "r"))
RATE = Setting("optim.lr", ("config", "optim", "lr"))


def test_settings_are_the_choices_and_then_the_paths_that_differ():
    assert settings([varied("lora"), varied("lora")]) == []
    assert settings([varied("lora", 8), varied("dora", 8), varied("dora", 16)]) == [LORA, RANK]
    assert settings([varied("lora", lr=1.0), varied("lora", lr=2.0)]) == [RATE]


def test_a_path_that_a_choice_settles_is_no_setting_unless_somebody_named_it():
    settled = [varied("lora", 8, 0.1), varied("dora", 16, 0.2)]
    assert settings(settled) == [LORA]
    assert settings(settled, ["lora.r"]) == [LORA, RANK]
    typed = [varied("lora", 8, 0.1, ["optim.lr=0.1"]), varied("dora", 16, 0.2, ["+optim.lr=0.2"])]
    assert settings(typed) == [LORA, RATE]


def test_what_a_row_chooses_by_is_a_column(tmp_path):
    text = TABLE.replace("{method: sft}", "{method: sft, loss.kd_ratio: 0.5}")
    runs = [example_run("sft"), example_run("neo", config={"loss": {"kd_ratio": 0.9}})]
    labels = [c["label"] for c in Page(page_of(tmp_path, runs, text=text)).data["columns"]]
    assert labels[:4] == ["run", "status", "method", "loss.kd_ratio"]


def test_curves_are_read_in_order_and_a_step_logged_again_counts_as_logged_last(tmp_path):
    text = "step,train/loss,val/kd\n1,4,\n2,3,0.5\n3,9,\n3,2,0.25\n2,1,\n"
    assert read_curves(log_of(tmp_path, text)) == (
        {"train/loss": [(1, 4), (2, 1), (3, 2)], "val/kd": [(2, 0.5), (3, 0.25)]},
        {},
    )


def test_logged_values_that_are_no_finite_number_are_counted(tmp_path):
    path = log_of(tmp_path, "step,train/loss\n1,nan\n2,inf\n3,1\n4,2\n")
    assert read_curves(path) == ({"train/loss": [(3, 1), (4, 2)]}, {"train/loss": 2})
    run = example_run()
    (shown,) = Page(page_of(tmp_path, [run], {run.run_id: path})).data["runs"]
    assert shown["unusable"] == {"train/loss": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,val/kid\n1,2\n", "metrics.csv: unknown metric 'val/kid': did you mean val/kd"),
        ("step,val/kd\n1,x\n", "metrics.csv: column 'val/kd': could not convert string"),
        ("step,val/kd\nx,1\n", "metrics.csv: column 'val/kd': could not convert string"),
    ],
)
def test_a_log_with_a_mistake_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"metrics\.csv") as caught:
        read_curves(log_of(tmp_path, text))
    assert message in str(caught.value)


def test_an_empty_log_has_no_curves(tmp_path):
    assert read_curves(log_of(tmp_path, "")) == ({}, {})


def test_held_out_kd_is_the_first_curve_and_a_single_value_is_none(tmp_path):
    path = log_of(
        tmp_path,
        "step,perf/tokens_per_s,train/loss,val/kd,val/ce,perf/init_s\n1,5,4,3,2,1\n2,5,4,3,2,\n",
    )
    run = example_run()
    data = Page(page_of(tmp_path, [run], {run.run_id: path})).data
    assert data["curve_names"] == ["val/kd", "val/ce", "train/loss", "perf/tokens_per_s"]
    assert data["metrics"]["val/kd"]["unit"] == "nats/token"
    steps, values = data["curves"][0]["val/kd"]
    assert (data["steps"][steps], values) == ([1, 2], [3, 3])


def test_curves_have_the_digits_of_the_log_and_steps_are_stored_once(tmp_path):
    path = log_of(tmp_path, "step,train/loss,train/ce\n1,0.12345678,1\n2,123456789,2.5\n")
    runs = four_runs()
    data = Page(page_of(tmp_path, runs, {r.run_id: path for r in runs})).data
    assert data["steps"] == [[1, 2]]
    assert data["curves"][0] == {
        "train/loss": [0, [0.12345678, 123456789]],
        "train/ce": [0, [1, 2.5]],
    }


curves = st.integers(1, 120).flatmap(
    lambda length: st.permutations(range(length)).map(
        lambda values: [(float(i), float(value)) for i, value in enumerate(values)]
    )
)


@given(curves, st.integers(4, 60))
def test_a_thinned_curve_keeps_its_ends_its_lowest_and_its_highest(curve, limit):
    thinned = thin(curve, limit)
    assert len(thinned) <= max(limit, 4)
    assert thinned == [point for point in curve if point in thinned]
    assert (thinned[0], thinned[-1]) == (curve[0], curve[-1])
    values = [value for _, value in curve]
    kept = [value for _, value in thinned]
    assert (min(kept), max(kept)) == (min(values), max(values))
    assert thinned == curve or len(curve) > limit


def test_a_page_of_many_long_curves_stays_within_its_points(tmp_path):
    assert points_per_curve(1) == MOST_POINTS
    assert points_per_curve(10**9) == FEWEST_POINTS
    for num in (1_100, 5_000, 12_000):
        assert FEWEST_POINTS < points_per_curve(num) < MOST_POINTS
        assert num * points_per_curve(num) <= MAX_POINTS
    long = "".join(f"{i},{(i * 7919) % 1009}\n" for i in range(20_000))
    path = log_of(tmp_path, f"step,train/loss\n{long}")
    run = example_run()
    text = page_of(tmp_path, [run], {run.run_id: path})
    _, values = Page(text).data["curves"][0]["train/loss"]
    assert len(values) <= MOST_POINTS
    assert f"A curve of more than {MOST_POINTS} points is thinned" in text


def test_a_run_of_a_real_search_takes_less_than_5_kb():
    table, records, logs = committed("variants_search")
    text = render_page(table, records, logs)
    assert len(text.encode()) < 5_000 * len(records)


def test_the_command_that_repeats_a_run_can_be_typed(tmp_path):
    run = example_run(overrides=["lora=dora", "data.path=a file"], argv=["neo-train", "x='y'"])
    (shown,) = Page(page_of(tmp_path, [run])).data["runs"]
    assert shown["repeat"] == "python -m neo.train lora=dora 'data.path=a file'"
    assert shown["command"] == """neo-train 'x='"'"'y'"'"''"""


# The script's pure functions, in the interpreter that a machine may have.

node = shutil.which("node")
needs_node = pytest.mark.skipif(node is None, reason="no node on PATH to run the page's script in")


def evaluate(expression, **values):
    """What the expression gives in the page's logic, with the values as constants."""
    logic = (PARTS / "logic.js").read_text(encoding="utf-8")
    given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
    program = f'"use strict";\n{logic}\n{given}process.stdout.write(JSON.stringify({expression}));'
    done = subprocess.run([node, "-"], input=program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_the_script_rebuilds_every_record(tmp_path):
    table, records, logs = committed("mini")
    data = Page(render_page(table, records, logs)).data
    found = evaluate("expand(data).map((run) => run.record)", data=data)
    # JavaScript has one kind of number: 1.0 comes back as 1.
    assert found == [json.loads(json.dumps(record)) for record in records_in(data).values()]


NUMBERS = [0, -0.0, 0.5, 1.5, 2.5, -2.5, 36.25, 36.35, 0.125, 0.375, 1.005, 2.675, -0.0004, 1e-9]
NUMBERS += [999.9999, 1234567, 2614.5, 2613.5, 12345.678, 1e15, -98765.4321, 43.75, 100 / 3]
NUMBERS += [k / 600 * 100 for k in range(0, 600, 7)] + [k / 16 for k in range(40)]


@needs_node
@pytest.mark.parametrize("decimals", range(7))
def test_the_script_prints_numbers_as_the_tables_do(decimals):
    found = evaluate("numbers.map((n) => printed(n, decimals))", numbers=NUMBERS, decimals=decimals)
    assert found == [number(n, decimals) for n in NUMBERS]


@needs_node
def test_the_script_sorts_numbers_as_numbers_and_what_is_missing_last():
    values = [3, None, 20, -1, "10", "9", "a10", "a9", 100.5]
    runs = [{"record": {"v": value} if value is not None else {}} for value in values]
    script = (
        "[false, true].map((d) => sortRuns(runs, {path: ['v']}, d).map((r) => r.record.v ?? null))"
    )
    up, down = evaluate(script, runs=runs)
    assert up == [-1, 3, 20, 100.5, "9", "10", "a9", "a10", None]
    assert down == ["a10", "a9", "10", "9", 100.5, 20, 3, -1, None]


@needs_node
def test_the_script_tells_a_missing_setting_from_null_and_from_a_text():
    runs = [{"record": {}}, {"record": {"a": None}}, {"record": {"a": "null"}}]
    column = {"path": ["a"], "setting": True, "decimals": None}
    script = "runs.map((run) => cellText(valueOf(run, column), column))"
    assert evaluate(script, runs=runs, column=column) == ["—", "null", "null"]
    assert evaluate("distinct(runs, column).length", runs=runs, column=column) == 3


@needs_node
def test_tokens_between_two_logged_steps_lie_on_a_line():
    logged = {"steps": [9, 19], "values": [100, 300]}
    script = "[4, 9, 14, 19, 25].map((s) => [tokensAt(logged, s, 310), tokensAt(logged, s)])"
    assert evaluate(script, logged=logged) == [
        [50, 50], [100, 100], [200, 200], [300, 300], [310, None]
    ]  # fmt: skip


@needs_node
def test_ticks_are_round_and_inside():
    linear = evaluate("[ticks(0.361, 0.489, 8), ticks(0, 510, 8), ticks(5, 5, 4)]")
    assert linear == [[0.38, 0.4, 0.42, 0.44, 0.46, 0.48], [0, 100, 200, 300, 400, 500], [5]]
    assert evaluate("logTicks(0.3, 40, 6)") == [0.5, 1, 2, 5, 10, 20]
    assert evaluate("logTicks(1e-7, 1, 6)") == [10**-k for k in range(7, -1, -1)]
    assert evaluate("tickTexts([0.38, 0.4, 0.42], false)") == ["0.38", "0.40", "0.42"]
    texts = evaluate("tickTexts([0.1, 0.0001, 0.00001, 1500, 2e6], true)")
    assert texts == ["0.1", "0.0001", "1e-5", "1,500", "2e6"]
