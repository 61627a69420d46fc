import errno
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fits import checkpoint, fit, history, trained
from lab import write_rows
from two_ranks import two_ranks

from neo.models.causal_lm import CausalLM
from neo.results.records import read_record
from neo.training import checkpoints
from neo.training.checkpoint_callback import Checkpoints
from neo.training.module import NeoModule
from neo.training.signals import Interrupted, StopSignals, requeue

SETTINGS = (
    "method=lora", "data.batch_size=1", "data.packing=false", "trainer.max_epochs=3",
    "optim.lr=0.01", "lora.lora_dropout=0.3", "checkpoint_every_n_steps=1000",
    "trainer.accumulate_grad_batches=3",
)  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    return f"data.path={write_rows(tmp_path / 'rows.jsonl')}"  # 8: steps of 3, 3 and 2


@contextmanager
def kill_in(method, when, signum=signal.SIGTERM):
    """Within it the process gets the signal in a call of the module's method, once."""
    was, sent = getattr(NeoModule, method), []

    def killing(self, *arguments, **keys):
        if not sent and when(self):
            sent.append(True)
            os.kill(os.getpid(), signum)
        return was(self, *arguments, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NeoModule, method, killing)
        yield


def in_step(step):
    return lambda module: module.trainer.global_step == step


def assert_same(folder, other):
    expected, actual = trained(folder), trained(other)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)
    for name in ("train/loss", "train/lr", "train/tokens"):
        assert history(other, name) == history(folder, name)


@pytest.mark.parametrize(
    "step", [1, 2, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 4, 5))]
)  # 2 and 5 are the last of an epoch
def test_a_run_that_is_asked_to_stop_saves_at_the_next_step_and_goes_on_to_the_bit(
    step, rows, student_dir, teacher_dir, tmp_path
):
    whole = fit(student_dir, teacher_dir, tmp_path / "whole", *SETTINGS, rows)
    with (
        kill_in("training_step", in_step(step)),
        pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {step + 1}, with a check"),
    ):
        fit(student_dir, teacher_dir, tmp_path / "cut", *SETTINGS, rows)
    record = read_record(tmp_path / "cut" / "record.json")
    assert record.status == "interrupted"
    assert record.error == f"Interrupted: stopped by SIGTERM at step {step + 1}, with a checkpoint"
    assert checkpoint(tmp_path / "cut")["global_step"] == step + 1
    resumed = fit(student_dir, teacher_dir, tmp_path / "cut", *SETTINGS, rows)
    assert resumed.status == "ok"
    assert resumed.num_tokens == whole.num_tokens
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_signal_in_the_last_step_leaves_a_checkpoint_that_needs_no_training(
    rows, student_dir, tmp_path
):
    settings = (*SETTINGS, rows, "data.val_share=0.3")
    whole = fit(student_dir, None, tmp_path / "whole", *settings)
    last = checkpoint(tmp_path / "whole")["global_step"] - 1
    with (
        kill_in("training_step", in_step(last)),
        pytest.raises(Interrupted, match=f"SIGTERM at step {last + 1}"),
    ):
        fit(student_dir, None, tmp_path / "cut", *settings)
    resumed = fit(student_dir, None, tmp_path / "cut", *settings)
    assert resumed.status == "ok"
    assert resumed.num_tokens == whole.num_tokens
    assert resumed.metrics["val/ce"] == whole.metrics["val/ce"]
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("accumulate", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_validation_is_not_waited_for_unless_it_fell_inside_a_step(
    accumulate, student_dir, tmp_path
):
    many = [{"prompt": f"{i} + 1?", "completion": str(i + 1)} for i in range(20)]
    settings = [
        *SETTINGS, f"data.path={write_rows(tmp_path / 'many.jsonl', many)}", "data.val_share=0.4",
        "trainer.val_check_interval=4", f"trainer.accumulate_grad_batches={accumulate}",
    ]  # fmt: skip
    whole = fit(student_dir, None, tmp_path / "whole", *settings)
    num_val = len(many) - whole.rows["read"]
    assert num_val > 3
    validated = []

    def second_of_second(module):
        validated.append(module.trainer.global_step)
        return len(validated) == num_val + 2

    with kill_in("validation_step", second_of_second), pytest.raises(Interrupted) as error:
        fit(student_dir, None, tmp_path / "cut", *settings)
    step = checkpoint(tmp_path / "cut")["global_step"]
    assert f"at step {step}, with a checkpoint" in str(error.value)
    assert step == (8 if accumulate == 1 else 3)
    assert len(history(tmp_path / "cut", "val/ce")) == (1 if accumulate == 1 else 2)
    assert fit(student_dir, None, tmp_path / "cut", *settings).status == "ok"
    assert_same(tmp_path / "whole", tmp_path / "cut")
    expected = history(tmp_path / "whole", "val/ce")
    if accumulate == 1:
        del expected[1]  # the one that was left, which is not repeated
    assert history(tmp_path / "cut", "val/ce") == expected


def test_a_signal_behind_the_last_step_ends_the_run_and_the_next_start_trains_nothing(
    rows, student_dir, tmp_path
):
    settings = (*SETTINGS, rows, "data.val_share=0.3")
    whole = fit(student_dir, None, tmp_path / "whole", *settings)
    with (
        kill_in("validation_step", lambda module: True),
        pytest.raises(Interrupted, match="outside of training"),
    ):
        fit(student_dir, None, tmp_path / "cut", *settings)
    assert read_record(tmp_path / "cut" / "record.json").status == "interrupted"
    with kill_in("training_step", lambda module: pytest.fail("trained again")):
        resumed = fit(student_dir, None, tmp_path / "cut", *settings)
    assert resumed.metrics["val/ce"] == whole.metrics["val/ce"]
    assert resumed.num_tokens == whole.num_tokens
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_while_weights_are_loaded_ends_the_run_at_once(
    rows, student_dir, tmp_path, monkeypatch
):
    load = CausalLM.load

    def killing(self, *arguments, **keys):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(self, *arguments, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "load", killing)
        with pytest.raises(Interrupted, match="SIGTERM outside of training"):
            fit(student_dir, None, tmp_path / "run", *SETTINGS, rows)
    assert read_record(tmp_path / "run" / "record.json").status == "interrupted"
    assert fit(student_dir, None, tmp_path / "run", *SETTINGS, rows).status == "ok"


def test_a_run_leaves_the_handlers_as_it_found_them(rows, student_dir, tmp_path):
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)]
    fit(student_dir, None, tmp_path / "run", *SETTINGS, rows, "trainer.max_steps=1")
    after = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)]
    assert after == before


def test_a_run_that_stops_on_a_full_disk_says_that_there_is_no_checkpoint(
    rows, student_dir, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_checkpoint", full)
    with (
        kill_in("training_step", in_step(1)),
        pytest.raises(Interrupted, match=r"at step 2, without a checkpoint: .*No space left"),
    ):
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that notes what it was asked, and the file it notes it in."""
    folder, noted = tmp_path / "bin", tmp_path / "asked"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {noted}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return noted


def test_slurms_warning_saves_and_requeues_the_job_once(
    rows, student_dir, tmp_path, monkeypatch, scontrol, capsys
):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with (
        kill_in("training_step", in_step(1), signal.SIGUSR1),
        pytest.raises(Interrupted, match="stopped by SIGUSR1 at step 2") as error,
    ):
        fit(student_dir, None, tmp_path / "run", *SETTINGS, rows)
    assert error.value.code == 138
    assert scontrol.read_text() == "requeue 4711\n"
    assert "SLURM job 4711 is back in the queue" in capsys.readouterr().err
    assert read_record(tmp_path / "run" / "record.json").status == "interrupted"
    assert fit(student_dir, None, tmp_path / "run", *SETTINGS, rows).status == "ok"
    assert scontrol.read_text() == "requeue 4711\n"


def test_nothing_else_requeues(scontrol, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue(Interrupted(signal.SIGUSR1, ""), print)  # no SLURM
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    requeue(Interrupted(signal.SIGTERM, ""), print)  # cancelled
    assert not scontrol.exists()


def test_a_requeue_that_fails_is_said(monkeypatch, tmp_path, scontrol):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    said = []
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    requeue(Interrupted(signal.SIGUSR1, ""), said.append)
    assert "scontrol requeue 4711 failed (status 1: no such job): submit the job again" in said[0]
    monkeypatch.setenv("PATH", str(tmp_path))
    requeue(Interrupted(signal.SIGUSR1, ""), said.append)
    assert "failed ([Errno 2]" in said[1]


def test_the_same_signal_twice_at_once_is_one(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: killed.append((pid, signum)))
    signals = StopSignals(Checkpoints(Path("nowhere"), 1))
    with signals:
        signals.waits = True
        signals._note(signal.SIGTERM, None)
        clock[0] += 1
        signals._note(signal.SIGTERM, None)
        assert not killed
        clock[0] += 4
        signals._note(signal.SIGTERM, None)
        assert killed == [(os.getpid(), signal.SIGTERM)]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_warning_before_the_end_of_the_job_still_requeues_it():
    signals = StopSignals(Checkpoints(Path("nowhere"), 1))
    signals.waits = True
    signals._note(signal.SIGUSR1, None)
    signals._note(signal.SIGTERM, None)  # SLURM's, at the time limit
    assert signals.received == signal.SIGUSR1


def command(student, folder, rows, *overrides):
    return [
        sys.executable, "-m", "neo.train", "data=jsonl", rows, "data.max_length=128",
        "data.val_share=0", "trainer=cpu", "trainer.log_every_n_steps=1", "lora.r=4",
        f"student.path={student}", "teacher=none", f"run_dir={folder}", *SETTINGS,
        "trainer.max_epochs=16", *overrides,
    ]  # fmt: skip


def started(arguments, folder, step):
    """The process, when it has logged that step."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        file = folder / "metrics.csv"
        if file.exists() and file.read_text().count("\n") > step:
            return process
        time.sleep(0.01)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_a_process_that_is_terminated_and_started_again_ends_as_if_it_never_was(
    rows, student_dir, tmp_path
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(student_dir, whole, rows), check=True, capture_output=True)
    process = started(command(student_dir, cut, rows), cut, 7)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert "Traceback" not in said
    found = re.search(r"stopped by SIGTERM at step (\d+)", " ".join(said.split()))
    assert checkpoint(cut)["global_step"] == int(found[1]) < 48
    again = subprocess.run(command(student_dir, cut, rows), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"going on from step {found[1]} of" in again.stderr
    assert_same(whole, cut)


@pytest.mark.slow
def test_a_second_sigterm_ends_a_process_that_hangs(rows, student_dir, tmp_path):
    script = (
        "import time\n"
        "from neo.training.module import NeoModule\n"
        "NeoModule.validation_step = lambda *a: time.sleep(600)\n"
        "from neo.train import main\nmain()\n"
    )
    arguments = command(student_dir, tmp_path / "run", rows, "data.val_share=0.3")
    arguments[1:3] = ["-c", script]
    process = started([*arguments, "trainer.val_check_interval=5"], tmp_path / "run", 1)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_at_the_same_step_when_one_of_them_is_asked(
    rank, student_dir, rows, tmp_path
):
    said = two_ranks(student_dir, rows.removeprefix("data.path="), tmp_path, "kill", rank)
    assert said[0] == said[1] == "stopped by SIGTERM at step 3, with a checkpoint"
    (file,) = tmp_path.glob("*.ckpt")
    assert checkpoints.fault_of(file) is None
    assert len(torch.load(file, weights_only=True)["neo"]["rng"]) == 2
