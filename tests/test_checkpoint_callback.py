import errno
import os
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from fits import checkpoint, fit, history, power_cut, trained
from lab import write_rows
from safetensors import SafetensorError

from neo.config import ConfigError
from neo.results.records import read_record
from neo.training import checkpoints, ending
from neo.training.checkpoint_callback import Checkpoints
from neo.training.checkpoints import checkpoint_file, fault_of, read_commit
from neo.training.ending import OutputError
from neo.training.module import NeoModule

MANY = [{"prompt": f"{i} + 1?", "completion": str(i + 1)} for i in range(12)]
SETTINGS = (
    "method=lora", "data.batch_size=2", "data.packing=false", "trainer.max_epochs=2",
    "optim.lr=0.01", "lora.lora_dropout=0.3", "checkpoint_every_n_steps=3",
)  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    return f"data.path={write_rows(tmp_path / 'rows.jsonl', MANY)}"


def steps(folder):
    return sorted(int(path.stem[5:]) for path in (folder / "checkpoints").glob("*.ckpt"))


def assert_same(folder, other):
    for name, value in trained(folder).items():
        torch.testing.assert_close(trained(other)[name], value, rtol=0, atol=0)
    for name in ("train/loss", "train/tokens", "val/ce"):
        assert history(other, name) == history(folder, name)


def test_a_run_whose_newest_checkpoint_is_torn_goes_on_from_the_one_before(
    rows, student_dir, tmp_path, capsys
):
    settings = (*SETTINGS, rows, "keep_last=2", "checkpoint_every_n_steps=2")
    fit(student_dir, None, tmp_path / "whole", *settings)
    with power_cut(9):
        fit(student_dir, None, tmp_path / "cut", *settings)
    assert steps(tmp_path / "cut") == [6, 8]
    newest = checkpoint_file(tmp_path / "cut" / "checkpoints", 8)
    os.truncate(newest, newest.stat().st_size - 1)
    capsys.readouterr()
    record = fit(student_dir, None, tmp_path / "cut", *settings)
    said = capsys.readouterr().err
    assert f"{newest} is passed over: it has" in said
    older = checkpoint_file(tmp_path / "cut" / "checkpoints", 6)
    assert f"going on from step 6 of {older}" in said
    assert record.status == "ok"
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("often", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_validations_and_what_is_logged_are_the_same_after_a_stop(
    often, rows, student_dir, tmp_path
):
    settings = (*SETTINGS, rows, "data.val_share=0.3", "checkpoint_every_n_steps=1",
                f"trainer.val_check_interval={often}")  # fmt: skip
    fit(student_dir, None, tmp_path / "whole", *settings)
    with power_cut(3):
        fit(student_dir, None, tmp_path / "cut", *settings)
    fit(student_dir, None, tmp_path / "cut", *settings)
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_run_begins_anew_when_it_is_asked_to(rows, student_dir, tmp_path):
    fit(student_dir, None, tmp_path / "run", *SETTINGS, rows)
    with power_cut(1):
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "rerun=true")
    assert steps(tmp_path / "run") == []  # what the finished run left is not this one's
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    assert fit(student_dir, None, tmp_path / "run", *SETTINGS, rows).status == "ok"


def test_the_best_validations_are_kept_and_can_be_gone_back_to(
    rows, student_dir, tmp_path, monkeypatch
):
    losses = iter([5.0, 3.0, 4.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0])
    with monkeypatch.context() as patch:
        patch.setattr(
            NeoModule, "on_validation_epoch_end",
            lambda self: self.log("val/loss", torch.tensor(next(losses))),
        )  # fmt: skip
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "keep_best=2", "keep_last=1",
            "data.val_share=0.3", "trainer.val_check_interval=2",
            "checkpoint_every_n_steps=1000")  # fmt: skip
    found = steps(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    scores = [read_commit(checkpoint_file(folder, step)).val_loss for step in found]
    assert found[:2] == [4, 6]
    assert scores == [3.0, 4.0, 9.0]
    assert all(fault_of(checkpoint_file(folder, step)) is None for step in found)
    weights = torch.load(checkpoint_file(folder, 4), weights_only=True)
    assert weights["global_step"] == 4


@pytest.mark.slow
def test_a_validation_inside_a_step_is_not_kept_and_it_is_said_once(
    rows, student_dir, tmp_path, capsys
):
    fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "keep_best=3",
        "data.val_share=0.3", "trainer.val_check_interval=1", "data.batch_size=1",
        "trainer.accumulate_grad_batches=2", "trainer.max_epochs=1")  # fmt: skip
    assert capsys.readouterr().err.count("keep_best passes over validations") == 1
    assert len(steps(tmp_path / "run")) >= 3


def test_the_best_cannot_be_kept_without_rows_to_validate_on(rows, student_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"keep_best=1: .* no rows to validate on; use 0, or"):
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "keep_best=1")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_no_run_and_is_counted(
    rows, student_dir, tmp_path, monkeypatch, capsys
):
    whole = fit(student_dir, None, tmp_path / "whole", *SETTINGS, rows)
    write = checkpoints.write_checkpoint

    def at_times(state, *arguments):
        return (full if state["global_step"] in (6, 9) else write)(state, *arguments)

    monkeypatch.setattr(checkpoints, "write_checkpoint", at_times)
    record = fit(student_dir, None, tmp_path / "full", *SETTINGS, rows)
    assert record.status == "ok"
    assert record.metrics["perf/failed_checkpoints"] == 2
    assert "perf/failed_checkpoints" not in whole.metrics
    said = capsys.readouterr().err
    assert (
        said.count("COULD NOT BE WRITTEN: No space left on device. The run goes on; kept is") == 2
    )
    assert_same(tmp_path / "whole", tmp_path / "full")


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError(errno.ENOSPC, "No space left"), marks=pytest.mark.slow),
        SafetensorError("28"),
    ],
)
def test_outputs_that_cannot_be_written_fail_the_run_and_the_next_start_only_writes_them(
    error, rows, student_dir, tmp_path, monkeypatch
):
    def no_room(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ending, "save_student", no_room)
        with pytest.raises(OutputError, match="newest checkpoint holds them"):
            fit(student_dir, None, tmp_path / "run", *SETTINGS, rows)
    assert read_record(tmp_path / "run" / "record.json").status == "failed"

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(NeoModule, "training_step", refuse)
    assert fit(student_dir, None, tmp_path / "run", *SETTINGS, rows).status == "ok"
    assert trained(tmp_path / "run")


@contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True
    ).returncode:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_run_on_a_real_disk_that_fills_up_ends_with_a_message_and_goes_on_with_room(
    rows, student_dir, tmp_path, monkeypatch, capsys
):
    whole = fit(student_dir, None, tmp_path / "whole", *SETTINGS, rows)
    filler = tmp_path / "disk" / "filler"
    step = NeoModule.training_step

    def fills(self, batch, batch_idx):
        if self.trainer.global_step == 5 and not filler.exists():
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        return step(self, batch, batch_idx)

    with small_disk(tmp_path / "disk", "4m"):
        run = tmp_path / "disk" / "run"
        with monkeypatch.context() as patch:
            patch.setattr(NeoModule, "training_step", fills)
            with pytest.raises((OutputError, OSError)) as error:
                fit(student_dir, None, run, *SETTINGS, rows)
        said = capsys.readouterr().err
        assert "No space left on device" in str(error.value) + said
        assert steps(run) == [3]
        assert fault_of(checkpoint_file(run / "checkpoints", 3)) is None
        filler.unlink()
        record = fit(student_dir, None, run, *SETTINGS, rows)
        assert record.status == "ok"
        assert record.num_tokens == whole.num_tokens
        for name, value in trained(tmp_path / "whole").items():
            assert torch.equal(trained(run)[name], value)


@pytest.mark.slow
def test_a_checkpoint_holds_the_id_by_which_wandb_goes_on(rows, student_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    record = fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "logger=wandb",
                 "trainer.max_steps=1")  # fmt: skip
    assert checkpoint(tmp_path / "run")["neo"]["wandb_id"] == f"default-{record.run_id}"
    fit(student_dir, None, tmp_path / "csv", *SETTINGS, rows, "trainer.max_steps=1")
    assert checkpoint(tmp_path / "csv")["neo"]["wandb_id"] is None


def test_processes_that_found_different_checkpoints_do_not_train_on(tmp_path):
    def trainer(steps):
        stub = Mock(spec=L.Trainer, global_step=4)
        stub.datamodule = SimpleNamespace(ranks=SimpleNamespace(gather=lambda mine: steps))
        return stub

    callback = Checkpoints(tmp_path, every_n_steps=1)
    callback.on_train_start(trainer([4, 4]), L.LightningModule())
    with pytest.raises(ValueError, match=r"checkpoints of steps \[4, 0\]; all of them must see"):
        callback.on_train_start(trainer([4, 0]), L.LightningModule())
