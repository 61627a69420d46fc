"""A run of several processes from one command: its end, and its ends before time."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from devices import environment
from fits import settings, trained
from lab import ROWS, tiny_model, write_rows
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from neo.training.launch import ProcessesFailed, _first

TWO = ("trainer.strategy=ddp", "trainer.devices=2", "optim.lr=1e-3")
ENDLESS = (
    *TWO, "trainer.max_epochs=-1", "trainer.max_steps=100000", "checkpoint_every_n_steps=2",
    "data.packing=false", "data.batch_size=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_model(folder / "student", seed=1), tiny_model(folder / "teacher", hidden=48, seed=2)


@contextmanager
def started(folder, overrides):
    """A run under way; what it says goes to a file, for a pipe nobody reads would stop it."""
    folder.mkdir(exist_ok=True)
    said = folder / f"said-{len(list(folder.glob('said-*')))}.txt"
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "neo.train", *overrides],
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        process.said = said.read_text
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ranks(process):
    """The processes of a run by their rank."""
    found = {}
    for child in psutil.Process(process.pid).children():
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child
    return found


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)


def record_in(folder: Path):
    return json.loads((folder / "record.json").read_text())


def failure(exit_code, timestamp):
    made = ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file="<N/A>")
    made.timestamp = timestamp
    return made


def test_the_first_to_fail_is_told_from_those_it_left_alone():
    assert _first({0: failure(1, 10), 1: failure(1, 9)})[0] == 1
    # one that was killed tells no time
    assert _first({0: failure(1, 10), 1: failure(-9, 11)})[0] == 1
    # and the launcher ends the others by SIGTERM
    assert _first({0: failure(-15, 9), 1: failure(1, 10)})[0] == 1
    assert str(ProcessesFailed(1, failure(-9, 0))).startswith("rank 1: killed by SIGKILL")


@pytest.mark.slow
def test_one_command_trains_in_two_processes_and_leaves_one_record(models, tmp_path):
    run = tmp_path / "run"
    overrides = settings(*models, run, *TWO, "trainer.max_steps=3")
    with started(tmp_path, overrides) as process:
        assert process.wait(180) == 0, process.said()
        assert process.said().count("trained ") == 1  # one plan
    assert record_in(run)["status"] == "ok"
    assert record_in(run)["rows"]["read"] == 10  # of both
    assert trained(run)
    with started(tmp_path, overrides) as process:
        assert process.wait(60) == 0
        assert "is recorded" in process.said()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run_soon_and_the_next_start_goes_on(models, tmp_path, rank):
    run = tmp_path / "run"
    overrides = settings(*models, run, *ENDLESS)
    reason = f"rank {rank}: killed by SIGKILL"
    with started(tmp_path, overrides) as process:
        wait_until(lambda: any(run.glob("checkpoints/*.ckpt")))
        ranks(process)[rank].kill()
        began = time.monotonic()
        assert process.wait(60) == 1, process.said()
        assert time.monotonic() - began < 30
        assert reason in process.said().splitlines()[-1]
    assert record_in(run)["status"] == "failed"
    assert reason in record_in(run)["error"]
    with started(tmp_path, overrides) as process:
        wait_until(lambda: "going on from step" in process.said())
        lines = (run / "metrics.csv").read_text().count("\n")
        wait_until(lambda: (run / "metrics.csv").read_text().count("\n") > lines + 3)


@pytest.mark.slow
def test_the_processes_of_a_launcher_that_is_killed_save_and_leave(models, tmp_path):
    run = tmp_path / "run"
    with started(tmp_path, settings(*models, run, *ENDLESS)) as process:
        wait_until(lambda: any(run.glob("checkpoints/*.ckpt")))
        left = ranks(process)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(left.values(), timeout=30)
        assert not alive
    assert record_in(run)["status"] == "interrupted"
    assert "SIGTERM at step" in record_in(run)["error"]


@pytest.mark.slow
def test_checkpoints_that_cannot_be_written_leave_no_process_waiting(models, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("no folder")  # the second rank sees no error of the first's
    every = ("trainer.max_steps=2", "trainer.max_epochs=-1", "checkpoint_every_n_steps=2")
    with started(tmp_path, settings(*models, run, *TWO, *every)) as process:
        assert process.wait(120) == 1, process.said()
    assert record_in(run)["metrics"]["perf/failed_checkpoints"] >= 1
    assert "could not be written" in record_in(run)["error"]


@pytest.mark.slow
def test_what_one_rank_raises_is_the_reason_of_the_run(models, tmp_path):
    # in their order, every second row goes to the second process
    rows = [row if i % 2 == 0 or i < 4 else {"prompt": "a"} for i, row in enumerate(ROWS * 4)]
    run = tmp_path / "run"
    overrides = settings(
        *models, run, *TWO, "data.max_bad_rows=3", "data.shuffle=false", "data.packing=false",
        "data.batch_size=1", f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}",
    )  # fmt: skip
    with started(tmp_path, overrides) as process:
        assert process.wait(180) == 1
        assert "rank 1: data.max_bad_rows=3" in process.said()
    assert record_in(run)["status"] == "failed"
    assert "rank 1: TooManyBadRows: data.max_bad_rows=3" in record_in(run)["error"]


def test_from_python_a_run_of_several_processes_is_refused(models, tmp_path):
    from fits import fit

    with pytest.raises(ValueError, match="torchrun"):
        fit(*models, tmp_path, *TWO)
    assert not (tmp_path / "record.json").exists()
    assert "TORCHELASTIC_RUN_ID" not in os.environ
