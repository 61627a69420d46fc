from dataclasses import replace

import pytest
from example_runs import example_run

from neo.results.evaluations import is_untrained, with_evaluation, without_evaluations
from neo.results.metrics import metric_info, stderr_name
from neo.results.notes import origin
from neo.results.records import SCHEMA_VERSION, RunRecord
from neo.results.row_spec import RowSpec
from neo.results.table_spec import ColumnSpec, TableSpec
from neo.results.tables import build_table

RUN = example_run(metrics={"val/ce": 1.0, "eval/mini/exact_match": 0.5})


def entry(*tasks, **settings):
    how = {task: {"version": 1, "num_rows": 10} for task in tasks}
    return {"name": tasks[0], "tasks": how, "num_tasks": len(tasks), "settings": settings}


def test_numbers_are_added_and_the_runs_own_stay():
    record = with_evaluation(RUN, entry("arc"), {"eval/arc/acc": 0.25, "eval/arc/acc_stderr": 0.1})
    assert record.metrics == RUN.metrics | {"eval/arc/acc": 0.25, "eval/arc/acc_stderr": 0.1}
    assert RunRecord.from_json(record.to_json()) == record
    assert without_evaluations(record) == RUN


def test_a_record_of_an_older_version_becomes_one_of_the_newest():
    record = with_evaluation(replace(RUN, schema_version=1), entry("arc"), {"eval/arc/acc": 0.25})
    assert record.schema_version == SCHEMA_VERSION == 3
    assert '"evaluations"' not in replace(RUN, schema_version=2).to_json()


def test_a_task_has_the_numbers_of_its_newest_evaluation_only():
    first = with_evaluation(
        RUN, entry("group", "a", "b", limit=2),
        {"eval/group/acc": 0.5, "eval/a/acc": 0.5, "eval/a/f1": 0.1, "eval/b/acc": 0.5},
    )  # fmt: skip
    second = with_evaluation(first, entry("a", limit=9), {"eval/a/acc": 0.75})
    assert second.metrics == RUN.metrics | {
        "eval/group/acc": 0.5,
        "eval/b/acc": 0.5,
        "eval/a/acc": 0.75,
    }
    assert [list(old["tasks"]) for old in second.evaluations] == [["group", "b"], ["a"]]
    third = with_evaluation(second, entry("group", "b"), {"eval/group/acc": 0.1})
    assert [old["name"] for old in third.evaluations] == ["a", "group"]
    assert "eval/b/acc" not in third.metrics


def test_a_number_of_the_run_itself_is_never_replaced():
    with pytest.raises(ValueError, match=r"eval/mini/exact_match: was recorded by the run itself"):
        with_evaluation(RUN, entry("mini"), {"eval/mini/acc": 1.0})


def test_what_is_no_number_is_left_out():
    record = with_evaluation(RUN, entry("a"), {"eval/a/acc": float("nan"), "eval/a/f1": 0.5})
    assert "eval/a/acc" not in record.metrics
    assert record.metrics["eval/a/f1"] == 0.5


@pytest.mark.parametrize("key", ["name", "tasks", "num_tasks", "settings"])
def test_an_evaluation_that_does_not_say_how_is_refused_with_its_place(key):
    broken = entry("a")
    del broken[key]
    with pytest.raises(ValueError, match=rf"evaluations\[0\]\.{key}: None"):
        replace(RUN, evaluations=[broken])


def test_only_what_an_evaluation_made_is_untrained():
    assert not is_untrained(RUN)
    assert is_untrained(replace(RUN, config={"evaluated": {"role": "base"}}))


@pytest.mark.parametrize(
    ("name", "unit", "better"),
    [
        ("eval/arc_easy/acc_norm", "%", "higher"),
        ("eval/arc_easy/acc_norm_stderr", "%", None),
        ("eval/gsm8k/exact_match/strict-match", "%", "higher"),
        ("eval/gsm8k/exact_match_stderr/strict-match", "%", None),
        ("eval/wikitext/word_perplexity", "", "lower"),
        ("eval/wikitext/word_perplexity_stderr", "", None),
        ("eval/wmt/bleu", "", "higher"),
    ],
)
def test_a_standard_error_has_the_unit_of_its_metric_and_no_better_end(name, unit, better):
    info = metric_info(name)
    assert (info.printed_unit, info.better) == (unit, better)
    if better:
        assert metric_info(stderr_name(name)).description.startswith("standard error of")


def test_a_table_says_how_its_evaluations_were_taken_and_of_how_many_rows():
    numbers = {"eval/arc/acc": 0.25, "eval/other/acc": 0.25}
    full, cut = (
        with_evaluation(
            replace(RUN, run_id=name, seed=len(settings)),
            entry("arc", "other", **settings),
            numbers,
        )
        for name, settings in (("a", {"harness": "1.2"}), ("b", {"harness": "1.2", "limit": 10}))
    )
    spec = TableSpec(
        title="t", rows=[RowSpec(label="all", where={"method": [RUN.choices["method"]]})],
        columns=[ColumnSpec(key="eval/arc/acc", source="metric", label="arc", unit="%",
                            decimals=1, better="higher", scale=100.0)],
    )  # fmt: skip
    (said,) = [line for line in origin(build_table(spec, [full, cut])) if "Evaluated" in line]
    assert said == (
        "Evaluated: arc by lm-evaluation-harness 1.2: 10 rows; "
        "arc by lm-evaluation-harness 1.2: 10 rows, limit=10"
    )
    assert not any("Evaluated" in line for line in origin(build_table(spec, [RUN])))
