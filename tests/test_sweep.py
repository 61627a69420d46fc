import threading
import time

import psutil
import pytest
from lab import ROWS, write_rows
from sweeps import by, records, small, sweep

from neo.config import conf_dir
from neo.training import sweep as sweep_module
from neo.training.run_folder import lock_run


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_module, "POLL_S", 0.1)


def four_ways(tmp_path, student, teacher):
    """Arguments of a sweep of four runs: one that can run, and one for each way to fail."""
    good = write_rows(tmp_path / "good.jsonl", ROWS)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(good.read_text() + '{"prompt": "cut o')
    ways = {
        "good": (good, 4, 0.001),
        "memory": (good, 1_000_000_000, 0.001),
        "diverges": (good, 4, 1e30),
        "broken": (broken, 4, 0.001),
    }
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    for name, (path, r, lr) in ways.items():
        (folder / f"{name}.yaml").write_text(
            f"# @package _global_\ndata: {{path: {path}}}\nlora: {{r: {r}}}\noptim: {{lr: {lr}}}\n"
        )
    return small(
        student, teacher, f"hydra.searchpath=[file://{tmp_path / 'conf'}]",
        f"experiment={','.join(ways)}", "max_skipped_steps=0", without=("data.path", "lora.r"),
    )  # fmt: skip


def by_experiment(found):
    assert len({record.choices["experiment"] for record in found}) == len(found)
    return {record.choices["experiment"]: record for record in found}


def test_every_job_is_run_once_and_a_second_sweep_runs_none(
    student_dir, teacher_dir, tmp_path, capfd
):
    arguments = small(student_dir, teacher_dir, "lora=lora,dora", "seed=0,1")
    assert sweep(*arguments) == 0
    found = records(tmp_path)
    assert sorted((r.choices["lora"], r.seed, r.status) for r in found) == [
        ("dora", 0, "ok"), ("dora", 1, "ok"), ("lora", 0, "ok"), ("lora", 1, "ok")
    ]  # fmt: skip
    assert "sweep default: 4 runs: 4 ok" in capfd.readouterr().err
    assert sweep(*arguments) == 0
    assert records(tmp_path) == found
    assert "4 of them were recorded before" in capfd.readouterr().err


def test_runs_that_fail_are_recorded_with_their_reasons_and_run_again_when_asked(
    student_dir, teacher_dir, tmp_path, capfd
):
    arguments = four_ways(tmp_path, student_dir, teacher_dir)
    assert sweep(*arguments) == 1
    said = capfd.readouterr().err
    assert "cannot run, which its record will say" in said.split("sweep default")[0]
    found = by_experiment(records(tmp_path))
    assert {name: r.status for name, r in found.items()} == {
        "good": "ok", "memory": "oom", "diverges": "diverged", "broken": "failed"
    }  # fmt: skip
    assert "broken.jsonl, line 9: not JSON" in found["broken"].error
    assert "max_skipped_steps=0" in found["diverges"].error
    assert "memory" in found["memory"].error.lower()
    assert "3 of 4 runs have failed" in said
    for record in (found["memory"], found["diverges"], found["broken"]):
        assert record.run_id in said.split("sweep default: 4 runs: ")[1]
    # a failed run is recorded as well: it is not run again, and the sweep still has not succeeded
    assert sweep(*arguments) == 1
    assert by_experiment(records(tmp_path)) == found
    # the file is mended
    (tmp_path / "broken.jsonl").write_text((tmp_path / "good.jsonl").read_text())
    assert sweep(*arguments, "retry=failed") == 1
    again = by_experiment(records(tmp_path))
    assert {name: r.status for name, r in again.items()} == {
        "good": "ok", "memory": "oom", "diverges": "diverged", "broken": "ok"
    }  # fmt: skip
    assert again["good"] == found["good"]
    assert all(again[name] != found[name] for name in ("memory", "diverges", "broken"))


def test_a_job_that_is_killed_is_recorded_with_the_signal(student_dir, teacher_dir, tmp_path):
    long = ("trainer.max_steps=100000", "checkpoint_every_n_steps=1")
    killed = []

    def kill():
        while not any(tmp_path.glob("runs/default/*/checkpoints/step-*.ckpt")):
            time.sleep(0.02)
        (folder,) = tmp_path.glob("runs/default/*")
        for process in psutil.Process().children(recursive=True):
            if any(file.path == str(folder / ".lock") for file in process.open_files()):
                killed.append(process.pid)
                process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    assert sweep(*small(student_dir, teacher_dir, *long, "seed=0")) == 1
    thread.join()
    assert len(killed) == 1
    (record,) = records(tmp_path)
    assert (record.status, record.error) == (
        "failed", "killed by SIGKILL; often by the system, for want of memory"
    )  # fmt: skip
    assert record.argv[-1] == "hydra.mode=RUN"


def test_a_run_that_another_sweep_trains_is_waited_for_and_taken_over_if_that_one_dies(
    student_dir, teacher_dir, tmp_path, capfd
):
    arguments = small(student_dir, teacher_dir, "seed=0,1")
    assert sweep(*arguments, "dry_run=true") == 0
    said = capfd.readouterr().err
    first = tmp_path / said.split("outputs ")[1].split()[0]
    assert not first.exists()
    order = []

    def another():
        with lock_run(first):
            while len(records(tmp_path)) < 1:  # the other run does not wait
                time.sleep(0.05)
            order.append(records(tmp_path)[0].seed)
            time.sleep(0.5)
            order.append("dies")

    thread = threading.Thread(target=another)
    thread.start()
    while not (first / ".lock").exists():
        time.sleep(0.01)
    assert sweep(*arguments) == 0
    thread.join()
    assert order == [1, "dies"]
    assert sorted((r.seed, r.status) for r in records(tmp_path)) == [(0, "ok"), (1, "ok")]


def test_nothing_starts_while_any_job_cannot(student_dir, teacher_dir, tmp_path, capfd):
    arguments = small(student_dir, teacher_dir, "lora.r=4,0", "seed=0,1", "data.batch_size=0,2")
    assert sweep(*arguments) == 2
    said = capfd.readouterr().err
    assert "lora.r=0" in said
    assert "data.batch_size=0: must be at least 1" in said
    assert "(of lora.r=0 seed=0 data.batch_size=0; lora.r=0 seed=0 data.batch_size=2;" in said
    assert not list(tmp_path.iterdir())


def test_one_folder_for_two_runs_is_refused(student_dir, teacher_dir, tmp_path, capfd):
    assert sweep(*small(student_dir, teacher_dir, "seed=0,1"), f"run_dir={tmp_path / 'a'}") == 2
    assert "is one folder for 2 runs" in capfd.readouterr().err


def test_jobs_that_are_one_run_are_run_once(student_dir, tmp_path, capfd):
    assert sweep(*small(student_dir, None, "logger=csv,csv", "method=lora")) == 0
    assert "1 runs (1 jobs ask for a run once more)" in capfd.readouterr().err
    assert len(records(tmp_path)) == 1


def test_where_a_run_runs_makes_it_another_run_only_where_that_is_compared(
    student_dir, tmp_path, capfd
):
    arguments = small(student_dir, None, "trainer.accelerator=cpu,auto", "method=lora")
    assert sweep(*arguments) == 0
    found = by(records(tmp_path), "trainer", "accelerator")
    assert set(found) == {"cpu", "auto"}
    assert len({r.run_id for r in found.values()}) == 2
    assert all(r.config["distinct"] == ["trainer.accelerator"] for r in found.values())
    assert all("distinct=[trainer.accelerator]" in r.argv for r in found.values())


def test_a_dry_sweep_says_its_plans_and_writes_nothing(student_dir, teacher_dir, tmp_path, capfd):
    assert sweep(*small(student_dir, teacher_dir, "seed=0,1", "dry_run=true")) == 0
    assert capfd.readouterr().err.count("outputs ") == 2
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_wrong_retry_is_refused(student_dir, tmp_path, capfd):
    assert sweep(*small(student_dir, None, "method=lora", "retry=all")) == 2
    assert "retry='all': must be null, or failed" in capfd.readouterr().err


def test_a_rerun_that_cannot_run_fails_the_sweep_and_leaves_the_record(student_dir, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    arguments = small(student_dir, None, "method=lora", f"data.path={rows}", "seed=0")
    assert sweep(*arguments) == 0
    found = records(tmp_path)
    rows.write_text(rows.read_text() + "{")
    assert sweep(*arguments, "rerun=true") == 1
    assert records(tmp_path) == found


def test_a_launcher_that_gives_up_ends_the_sweep_with_its_summary(student_dir, monkeypatch, capfd):
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    def gone(*_, **__):
        raise RuntimeError("task 3 was cancelled")

    monkeypatch.setattr(BasicLauncher, "launch", gone)
    assert sweep(*small(student_dir, None, "method=lora", "seed=0,1")) == 1
    said = capfd.readouterr().err
    assert "2 runs: 2 not recorded" in said
    assert "the launcher gave up (RuntimeError: task 3 was cancelled)" in said


def test_a_sweep_that_every_rank_would_begin_is_refused(student_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert sweep(*small(student_dir, None, "method=lora", "seed=0,1")) == 2
    assert "start it once, not by torchrun or srun" in capfd.readouterr().err
    assert not records(tmp_path)


def test_a_sweep_in_a_file_may_name_a_key_that_its_groups_file_does_not(
    student_dir, teacher_dir, tmp_path
):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "late.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      loss.kd_positions: aligned,release\n"
    )
    assert "kd_positions" not in (conf_dir() / "loss" / "forward_kl.yaml").read_text()
    words = small(student_dir, teacher_dir, f"hydra.searchpath=[file://{tmp_path / 'conf'}]",
                  "experiment=late", "dry_run=true")  # fmt: skip
    assert sweep(*words) == 0
