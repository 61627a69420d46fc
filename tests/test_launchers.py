"""The engines of a sweep, started as a user starts them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest
from devices import environment
from fits import trained
from sweeps import records, small, sweep

from neo.results.records import find_records, read_record


@contextmanager
def typed(folder, *arguments):
    """A sweep from the command line, in a session of its own; what it says goes to a file."""
    said = folder / f"said-{len(list(folder.glob('said-*')))}.txt"
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "neo.train", "-m", *arguments],
            cwd=folder, env=environment(), stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        process.said = said.read_text
        try:
            yield process
        finally:
            kill(process)


def kill(process):
    """Ends a sweep and all that it has started, as a power cut does."""
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.02)


@pytest.mark.slow  # make demo starts its runs this way, too
def test_joblib_runs_several_at_once_and_each_once(student_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = small(student_dir, None, "method=lora", "seed=0,1,2", "hydra/launcher=parallel")
    assert sweep(*arguments) == 0
    assert sorted((r.seed, r.status) for r in records(tmp_path)) == [(s, "ok") for s in range(3)]
    assert "Joblib.Parallel(n_jobs=2" in capfd.readouterr().out
    assert all(r.argv[:3] == ["python", "-m", "neo.train"] for r in records(tmp_path))


@pytest.mark.slow
def test_two_sweeps_started_at_once_share_the_runs(student_dir, teacher_dir, tmp_path):
    arguments = small(student_dir, teacher_dir, "lora=lora,dora,rslora", "seed=0,1,2,3")
    with typed(tmp_path, *arguments) as first, typed(tmp_path, *arguments) as second:
        assert first.wait(600) == 0, first.said()
        assert second.wait(600) == 0, second.said()
        said = [first.said(), second.said()]
    assert [r.status for r in records(tmp_path)] == ["ok"] * 12
    trained_by = [text.count(": ok\n") for text in said]  # the title of a run's result
    assert sum(trained_by) == 12
    assert min(trained_by) >= 3
    assert all("12 runs: 12 ok" in text for text in said)


@pytest.mark.slow
def test_jobs_of_one_and_of_two_processes_each_have_a_group_of_their_own(
    student_dir, teacher_dir, tmp_path
):
    arguments = small(student_dir, teacher_dir, "trainer=ddp", "trainer.devices=2,1",
                      "trainer.accelerator=cpu")  # fmt: skip
    with typed(tmp_path, *arguments) as process:
        assert process.wait(400) == 0, process.said()
        assert process.said().count(": ok\n") == 2
    found = {r.config["trainer"]["devices"]: r for r in records(tmp_path)}
    assert set(found) == {1, 2}
    assert all(r.status == "ok" for r in found.values())
    assert found[2].num_tokens > 1.5 * found[1].num_tokens  # in as many steps


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_sweep_whose_whole_group_is_told_to_stop_ends_behind_its_job(
    student_dir, teacher_dir, tmp_path, number
):
    long = ("trainer.max_steps=100000", "checkpoint_every_n_steps=100000", "seed=0,1")
    with typed(tmp_path, *small(student_dir, teacher_dir, *long)) as process:
        wait_until(lambda: any(tmp_path.glob("runs/default/*/metrics.csv")))
        (log,) = tmp_path.glob("runs/default/*/metrics.csv")
        wait_until(lambda: log.read_text().count("\n") > 3)
        os.killpg(process.pid, number)
        assert process.wait(60) == -number, process.said()
        (record,) = records(tmp_path)  # the second was not begun
        assert (record.status, "with a checkpoint" in record.error) == ("interrupted", True)


SWEEP = (
    "lora=lora,dora,rslora", "lora.r=4,8", "seed=0,1,2,3", "trainer=cpu", "trainer.max_steps=4",
    "data.num_rows=64", "data.num_val_rows=16", "data.batch_size=4", "data.packing=false",
    "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "checkpoint_every_n_steps=1",
    "trainer.enable_progress_bar=false", "experiment_name=lab",
)  # fmt: skip
TABLE = """\
title: A sweep
rows:
  - {label: LoRA, where: {lora: lora, lora.r: 4}}
  - {label: "LoRA, r=8", where: {lora: lora, lora.r: 8}}
  - {label: DoRA, where: {lora: dora, lora.r: 4}}
  - {label: "DoRA, r=8", where: {lora: dora, lora.r: 8}}
  - {label: rsLoRA, where: {lora: rslora, lora.r: 4}}
  - {label: "rsLoRA, r=8", where: {lora: rslora, lora.r: 8}}
columns:
  - {metric: val/kd}
  - {metric: val/ce}
  - {field: num_tokens}
"""


def rendered(folder):
    """The table of the sweep as CSV, with every digit."""
    from neo.report import report

    (folder / "experiments" / "lab").mkdir(parents=True)
    (folder / "experiments" / "lab" / "table.yaml").write_text(TABLE)
    out = folder / "out"
    report("lab", experiments=folder / "experiments", runs=folder / "runs", out=out)
    return (out / "table.csv").read_text()


@pytest.mark.slow
def test_a_sweep_of_24_runs_killed_in_the_middle_and_started_again_is_the_undisturbed_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    with typed(whole, *SWEEP) as process:
        assert process.wait(900) == 0, process.said()

    def in_the_middle():
        done = {path.parent for path in find_records(cut / "runs")}
        begun = {path.parents[1] for path in cut.glob("runs/lab/*/checkpoints/step-*.ckpt")}
        return len(done) >= 10 and begun - done

    with typed(cut, *SWEEP) as process:
        wait_until(in_the_middle, 600)
        kill(process)
    (interrupted,) = in_the_middle()
    before = {path: path.read_bytes() for path in find_records(cut / "runs")}
    assert 10 <= len(before) < 24
    with typed(cut, *SWEEP) as process:
        assert process.wait(900) == 0, process.said()
        assert f"24 runs, of which {len(before)} are recorded" in process.said()
        assert process.said().count("going on from step") == 1
        assert process.said().count(": ok\n") == 24 - len(before)
    found = {path.parent.name: read_record(path) for path in find_records(cut / "runs")}
    assert len(found) == 24
    assert {r.status for r in found.values()} == {"ok"}
    assert all(path.read_bytes() == content for path, content in before.items())  # none run twice
    assert interrupted.name in found
    for name in found:
        one, other = trained(whole / "runs/lab" / name), trained(cut / "runs/lab" / name)
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name
    assert rendered(whole) == rendered(cut)


@pytest.mark.slow
def test_a_job_of_submitit_that_is_preempted_saves_and_goes_on(student_dir, teacher_dir, tmp_path):
    arguments = small(
        student_dir, teacher_dir, "seed=0,1", "hydra/launcher=submitit_local",
        "trainer.max_steps=400", "checkpoint_every_n_steps=1000", "experiment_name=queue",
        "hydra.launcher.timeout_min=30",
    )  # fmt: skip
    with typed(tmp_path, *arguments) as process:
        wait_until(lambda: len(list(tmp_path.glob("runs/queue/*/metrics.csv"))) == 2)
        wait_until(
            lambda: all(
                path.read_text().count("\n") > 5
                for path in tmp_path.glob("runs/queue/*/metrics.csv")
            )
        )
        tasks = [
            task
            for task in psutil.process_iter()
            if "submitit.core._submit" in task.cmdline() and str(tmp_path) == task.cwd()
        ]
        assert len(tasks) == 2
        tasks[0].send_signal(signal.SIGUSR2)  # what SLURM sends for submitit before the end
        assert process.wait(600) == 0, process.said()
    assert [r.status for r in records(tmp_path, "queue")] == ["ok", "ok"]
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/queue/.submitit/*/*log.*"))
    assert logs.count("going on from step") == 1
    assert "Requeued job" in logs
    for path in tmp_path.glob("runs/queue/*/metrics.csv"):
        steps = [line.split(",")[0] for line in path.read_text().splitlines()[1:]]
        assert steps == [str(step) for step in range(400)]
