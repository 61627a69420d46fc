from io import StringIO

import pytest
from example_runs import example_run
from lab import ROWS, compose, write_rows
from rich.console import Console

from neo.config import SPECS, build
from neo.training.meet import meet_all
from neo.training.preflight import planned_or_refused
from neo.training.summary import print_plan, print_result


@pytest.fixture
def plan(student_dir, teacher_dir, tmp_path):
    def plan(*overrides):
        config = compose(
            f"student.path={student_dir}", f"teacher.path={teacher_dir}", "data=jsonl",
            f"data.path={write_rows(tmp_path / 'rows.jsonl', ROWS * 10)}", "data.max_length=64",
            "data.val_share=0.25", "lora.r=4", *overrides,
        )  # fmt: skip
        specs = {key: build(config[key]) for key in SPECS}
        if specs["teacher"].path is None:
            specs["teacher"] = None
        meeting, data = meet_all(config, specs)
        written = StringIO()
        planned = planned_or_refused(config, specs, meeting.vocab, data)
        console = Console(file=written, width=300)
        print_plan(console, config, specs, tmp_path, meeting, data, planned)
        return {line[:10].strip(): line[10:].strip() for line in written.getvalue().splitlines()}

    return plan


def test_a_plan_says_what_trains_on_what_against_whom_and_where_it_goes(plan, tmp_path):
    said = plan("seed=3", "optim.lr=0.001")
    assert "parameters" in said["student"]
    assert "in 28 tensors: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj" in said["trained"]
    assert "teacher" in said["teacher"]
    assert said["loss"] == "0.5 * ce + 0.5 * forward_kl at T=1"
    assert "60 rows (prompt_completion) to train on, 20 to validate on" in said["data"]
    assert said["optimizer"] == "AdamW, lr 0.001, cosine, warm-up 10%"
    assert "GiB on the device, most in the " in said["memory"]
    assert " TFLOP a step and device, " in said["compute"]
    assert "traffic" not in said
    assert said["outputs"] == str(tmp_path)


def test_a_plan_counts_the_steps_of_whichever_ends_the_run_first(plan):
    one_by_one = ["data.packing=false", "data.batch_size=2"]
    assert plan(*one_by_one)["steps"].startswith("about 30 (1 epoch) of 2 x 1 sequences")
    said = plan(*one_by_one, "trainer.max_epochs=2", "trainer.accumulate_grad_batches=3")["steps"]
    assert said.startswith("about 20 (2 epochs) of 2 x 3 sequences of at most 64 tokens")
    assert plan(*one_by_one, "trainer.max_steps=7")["steps"].startswith("7 of 2 x 1 sequences")
    assert plan(*one_by_one, "trainer.max_steps=70")["steps"].startswith("about 30 (1 epoch) of")
    said = plan(*one_by_one, "trainer.max_steps=70", "trainer.max_epochs=-1")["steps"]
    assert said.startswith("70 of 2 x 1")


def test_a_plan_without_a_teacher_says_so(plan):
    said = plan("method=lora", "teacher.path=null")
    assert said["teacher"] == "none"
    assert said["loss"].startswith("1 * ce + 0 * forward_kl")


def test_a_result_says_how_the_run_ended_with_units_and_what_lies_where(tmp_path):
    (tmp_path / "adapter").mkdir()
    record = example_run(
        metrics={"val/ce": 1.23456, "perf/peak_mem_gib": 0.5},
        num_tokens=12345,
        rows={"read": 10, "used": 7, "truncated": 2, "bad": {"empty": 3}},
        seconds=61.0,
    )
    written = StringIO()
    print_result(Console(file=written, width=200), record, tmp_path)
    said = " ".join(written.getvalue().split())
    for piece in ("mini/neo0: ok", "val/ce 1.2346 nats/token", "0.50 GiB", "12,345", "61.0 s",
                  "10 read, 2 truncated, unusable: 3 empty", "adapter"):  # fmt: skip
        assert piece in said


def test_a_result_of_a_run_that_failed_says_what_stopped_it(tmp_path):
    record = example_run(status="oom", error="OutOfMemoryError: tried to allocate 20 GiB")
    written = StringIO()
    print_result(Console(file=written, width=200), record, tmp_path)
    assert "oom" in written.getvalue()
    assert "OutOfMemoryError: tried to allocate 20 GiB" in written.getvalue()
