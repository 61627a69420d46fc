import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fits import ROWS, checkpoint, fit, history, power_cut, settings, trained
from lab import compose_raw

from neo.config import ConfigError, run_id
from neo.results.records import read_record
from neo.train import compose, train
from neo.training.module import NeoModule
from neo.training.run_folder import RunIsBusy, lock_run

FILES = {
    "alpaca": ROWS / "alpaca.json",
    "sharegpt": ROWS / "sharegpt.jsonl",
    "messages": ROWS / "messages.jsonl",
    "prompt_completion": ROWS / "prompt_completion.csv",
}


@pytest.mark.parametrize("schema", FILES)
def test_rows_of_every_schema_are_trained_on_from_the_command_line_of_the_readme(
    schema, student_dir, teacher_dir, tmp_path
):
    record = train(
        compose_raw(
            "data=jsonl",
            f"data.path={FILES[schema]}",
            f"student.path={student_dir}",
            f"teacher.path={teacher_dir}",
            "trainer.max_steps=20",
            "trainer.max_epochs=20",
            "data.max_length=128",
            f"run_dir={tmp_path}",
            "trainer.enable_progress_bar=false",
        )
    )
    assert record is not None
    assert record.status == "ok"
    assert record.data["schema"] == schema
    assert record.num_tokens
    assert record.rows["read"] == record.rows["used"] + sum(record.rows["bad"].values())
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        ".lock", "config.yaml", "record.json", "metrics.csv", "checkpoints", "adapter"
    }  # fmt: skip


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_never_stopped(
    student_dir, teacher_dir, tmp_path
):
    settings = ["trainer.max_epochs=3", "data.batch_size=2", "data.packing=false", "optim.lr=0.01",
                "checkpoint_every_n_steps=2", "lora.lora_dropout=0.1", "data.max_bad_rows=null",
                "trainer.accumulate_grad_batches=2"]  # fmt: skip
    whole = fit(student_dir, teacher_dir, tmp_path / "whole", *settings)

    with power_cut(5):
        fit(student_dir, teacher_dir, tmp_path / "cut", *settings)
    failed = read_record(tmp_path / "cut" / "record.json")
    assert failed.status == "failed"
    assert "the power went out" in failed.error
    resumed = fit(student_dir, teacher_dir, tmp_path / "cut", *settings)
    assert resumed.status == "ok"
    assert resumed.num_tokens == whole.num_tokens
    expected, actual = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)
    for name in ("train/loss", "train/lr", "train/tokens"):
        assert history(tmp_path / "cut", name) == history(tmp_path / "whole", name)


def test_how_often_a_run_validates_changes_no_weight(student_dir, teacher_dir, tmp_path):
    settings = ("data.val_share=0.3", "data.batch_size=1", "lora.lora_dropout=0.3", "optim.lr=0.01")
    for often in (1, 1000):
        fit(student_dir, teacher_dir, tmp_path / str(often), *settings,
            f"trainer.val_check_interval={often}", "trainer.max_epochs=2")  # fmt: skip
    for name, value in trained(tmp_path / "1").items():
        torch.testing.assert_close(trained(tmp_path / "1000")[name], value, rtol=0, atol=0)


def test_a_run_that_another_process_trains_is_left_alone(student_dir, tmp_path):
    overrides = settings(student_dir, None, tmp_path, "method=lora", "trainer.max_steps=1")
    with lock_run(tmp_path), pytest.raises(RunIsBusy, match="another process is training"):
        train(compose_raw(*overrides), wait_s=0.0)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert train(compose_raw(*overrides), wait_s=0.0).status == "ok"


def test_a_recorded_run_is_skipped_and_rerun_trains_it_again(student_dir, tmp_path, monkeypatch):
    settings = ("method=sft", "trainer.max_steps=1")
    first = fit(student_dir, None, tmp_path, *settings)
    steps = []
    monkeypatch.setattr(
        NeoModule, "on_before_optimizer_step",
        lambda self, optimizer, was=NeoModule.on_before_optimizer_step: (
            steps.append(1), was(self, optimizer))[1],
    )  # fmt: skip
    assert fit(student_dir, None, tmp_path, *settings) == first
    assert not steps
    assert fit(student_dir, None, tmp_path, *settings, "rerun=true").status == "ok"
    assert len(steps) == 1


def test_a_folder_that_holds_another_run_is_refused(student_dir, tmp_path):
    fit(student_dir, None, tmp_path, "method=sft", "trainer.max_steps=1")
    with pytest.raises(ConfigError, match=r"run_dir=.*holds run"):
        fit(student_dir, None, tmp_path, "method=sft", "trainer.max_steps=2")


def test_a_checkpoint_holds_what_was_trained_and_no_code(student_dir, teacher_dir, tmp_path):
    record = fit(student_dir, teacher_dir, tmp_path, "trainer.max_steps=1")
    names = checkpoint(tmp_path)["state_dict"]
    assert names
    assert all("lora_" in name for name in names)
    assert sum(value.numel() for value in names.values()) == record.num_trainable_parameters


def test_out_of_memory_is_recorded(student_dir, tmp_path, monkeypatch):
    def too_much(self, batch, i):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    monkeypatch.setattr(NeoModule, "training_step", too_much)
    with pytest.raises(torch.OutOfMemoryError):
        fit(student_dir, None, tmp_path, "method=sft")
    record = read_record(tmp_path / "record.json")
    assert record.status == "oom"
    assert "20.00 GiB were asked for" in record.error


def test_a_dry_run_prints_the_plan_and_writes_and_loads_nothing(
    student_dir, teacher_dir, tmp_path, monkeypatch, capsys
):
    import safetensors.torch

    def refuse(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(NeoModule, "configure_model", refuse)
    folder = tmp_path / "run"
    config = compose_raw(
        "dry_run=true", f"student.path={student_dir}", f"teacher.path={teacher_dir}",
        f"run_dir={folder}", "lora.r=4",
    )  # fmt: skip
    assert train(config) is None
    assert not folder.exists()
    printed = capsys.readouterr().err
    for word in ("student", "trained", "teacher", "optimizer", "supervised tokens", "q_proj"):
        assert word in printed


def test_the_record_says_what_was_run(student_dir, teacher_dir, tmp_path):
    record = fit(
        student_dir, teacher_dir, tmp_path, "trainer.max_steps=2", "seed=3", "data.val_share=0.3"
    )
    assert record.seed == 3
    assert record.run_id == run_id(record.config)
    assert record.models["student"]["path"] == str(student_dir)
    assert len(record.models["teacher"]["hash"]) == 16
    for name in ("val/ce", "val/kd", "val/loss", "val/agreement", "perf/tokens_per_s"):
        assert name in record.metrics
    half = 0.5 * (record.metrics["val/ce"] + record.metrics["val/kd"])
    assert record.metrics["val/loss"] == pytest.approx(half, rel=1e-5)
    assert record.config["loss"]["kd_ratio"] == 0.5


def test_methods_without_a_teacher_are_measured_against_one_that_is_given(
    student_dir, teacher_dir, tmp_path
):
    with_teacher = fit(student_dir, teacher_dir, tmp_path / "with", "method=lora",
                       "data.val_share=0.3", "trainer.max_steps=2")  # fmt: skip
    without = fit(student_dir, None, tmp_path / "without", "method=lora", "data.val_share=0.3",
                  "trainer.max_steps=2")  # fmt: skip
    assert "val/kd" in with_teacher.metrics
    assert "val/kd" not in without.metrics
    assert with_teacher.metrics["val/ce"] == pytest.approx(without.metrics["val/ce"])
    expected, actual = trained(tmp_path / "without"), trained(tmp_path / "with")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)


def test_bad_rows_are_counted_by_reason_and_stop_the_run_past_the_limit(student_dir, tmp_path):
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [{"messages": [question, answer]}] * 6
    rows += [{"messages": [question]}] * 2 + [{"messages": []}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    record = fit(student_dir, None, tmp_path / "some", "method=sft", f"data.path={file}")
    assert record.rows["bad"] == {"no_assistant_turn": 2, "empty": 1}
    assert record.rows["read"] == 9
    with pytest.raises(ValueError, match=r"data.max_bad_rows=2: 3 of the"):
        fit(student_dir, None, tmp_path / "none", "method=sft", f"data.path={file}",
            "data.max_bad_rows=2")  # fmt: skip
    assert read_record(tmp_path / "none" / "record.json").status == "failed"


def test_a_typed_sweep_runs_every_job_and_a_second_time_none(student_dir, tmp_path):
    command = [
        sys.executable, "-m", "neo.train", "-m", "data=jsonl", f"data.path={FILES['messages']}",
        "method=sft,lora", "seed=3", f"student.path={student_dir}", "trainer.max_steps=1",
        "data.max_length=64", "experiment_name=typed", "trainer.enable_progress_bar=false",
    ]  # fmt: skip
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    records = [read_record(p) for p in tmp_path.glob("runs/typed/*/record.json")]
    assert sorted((r.choices["method"], r.seed) for r in records) == [
        ("lora", 3), ("sft", 3)
    ]  # fmt: skip
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 runs, of which 2 are recorded" in again.stderr
    files = {path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()}
    assert files == {"runs"}


def test_metrics_csv_has_a_row_per_logged_step(student_dir, tmp_path):
    fit(student_dir, None, tmp_path, "method=sft", "trainer.max_steps=4", "trainer.max_epochs=9")
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert Path(tmp_path / "config.yaml").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["sft", "neo"])
def test_a_gpu_trains_in_bf16_and_keeps_what_is_trained_in_fp32(
    method, student_dir, teacher_dir, tmp_path
):
    settings = (
        f"method={method}",
        "trainer.max_steps=20",
        "trainer.max_epochs=-1",
        "optim.lr=0.01",
    )
    record = fit(student_dir, teacher_dir, tmp_path, *settings, "trainer=gpu")
    assert record.config["trainer"]["precision"] == "bf16-mixed"
    assert record.metrics["perf/peak_mem_gib"] > 0
    losses = history(tmp_path, "train/loss")
    assert losses[-1] < losses[0]
    assert all(value.dtype == torch.float32 for value in trained(tmp_path).values())


def test_a_config_composed_from_python_is_that_of_the_command_line():
    arguments = ["method=kd", "student.dtype=bfloat16", "seed=3"]  # a key that no file mentions
    assert compose(*arguments) == compose_raw(*arguments)
    assert compose(*arguments).student.dtype == "bfloat16"
