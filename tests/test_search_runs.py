"""Searches and comparisons whose runs are real, from the command line."""

import json
import subprocess
import sys

import pytest
from devices import environment
from lab import write_rows
from test_launch import started, wait_until

pytest.importorskip("optuna")

from neo.results.records import find_records, read_record

MANY = [{"prompt": f"{i} plus {i % 7}?", "completion": str(i + i % 7)} for i in range(40)]


@pytest.fixture
def small(student_dir, teacher_dir, tmp_path):
    """Overrides of a small run on rows of its own; a step takes milliseconds."""
    rows = write_rows(tmp_path / "rows.jsonl", MANY)
    return [
        "data=jsonl", f"data.path={rows}", "data.max_length=64", "data.batch_size=4",
        "data.packing=false", "data.val_share=0.3", "trainer=cpu", "trainer.max_epochs=-1",
        "trainer.max_steps=24", "trainer.val_check_interval=6", "lora.r=4", "loss.kd_ratio=1.0",
        "trainer.enable_progress_bar=false", f"student.path={student_dir}",
        f"teacher.path={teacher_dir}", "seed=0", "experiment_name=s",
    ]  # fmt: skip


SEARCH = [
    "-m", "hydra/sweeper=optuna", "optim.lr=tag(log,interval(1e-7,1e-1))",
    "hydra.sweeper.sampler={name: tpe, n_startup_trials: 5}", "hydra.sweeper.seed=3",
]  # fmt: skip


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "neo.train", *arguments],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=500,
    )  # fmt: skip


def trials_of(folder):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(folder / "runs/s/optuna.journal")))
    return optuna.load_study(study_name="s", storage=storage).trials


def records_in(folder):
    return [read_record(path) for path in find_records(folder)]


@pytest.mark.slow
def test_a_search_finds_the_region_where_rates_learn_and_stops_hopeless_runs(small, tmp_path):
    """Six decades of rates: in the upper one and a half a run learns, below it hardly does."""
    pruner = "hydra.sweeper.pruner={name: median, n_startup_trials: 3}"
    done = run(tmp_path, *SEARCH, *small, "hydra.sweeper.n_trials=12", pruner)
    assert done.returncode == 0, done.stderr[-3000:]
    trials = trials_of(tmp_path)
    assert len(trials) == 12
    lrs = [trial.params["optim.lr"] for trial in trials]
    ended = [trial for trial in trials if trial.state.name == "COMPLETE"]
    best = min(ended, key=lambda trial: trial.value)
    assert best.params["optim.lr"] >= 3e-3
    assert not any(lr >= 3e-3 for lr in lrs[:5])  # by chance it is not found: the first are random
    assert sum(lr >= 3e-3 for lr in lrs[5:]) >= 3
    typed = (tmp_path / "runs/s/chosen.txt").read_text()
    assert typed == f"optim.lr={best.params['optim.lr']}\n"
    # and what was hopeless was stopped before its last step, with the reason
    records = {r.config["optim"]["lr"]: r for r in records_in(tmp_path / "runs")}
    pruned = [r for r in records.values() if r.status == "pruned"]
    assert pruned
    for record in pruned:
        assert record.error.startswith("Pruned: at step ")
        (checkpoint,) = (tmp_path / "runs/s" / record.run_id).glob("checkpoints/*.ckpt")
        assert int(checkpoint.stem[5:]) < 24
        assert record.metrics["val/kd"] > best.value
    assert {r.status for r in records.values()} == {"ok", "pruned"}


@pytest.mark.slow
def test_a_search_that_is_killed_ends_as_if_it_never_had_been(small, tmp_path):
    arguments = [*SEARCH, *small, "hydra.sweeper.n_trials=7"]
    (tmp_path / "whole").mkdir()
    assert run(tmp_path / "whole", *arguments).returncode == 0
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        cut.mkdir()
        patch.chdir(cut)
        with started(cut, arguments) as process:
            wait_until(lambda: len(list(cut.glob("runs/s/*/record.json"))) == 2)
            wait_until(lambda: len(list(cut.glob("runs/s/*/config.yaml"))) == 3)
            process.kill()
    done = run(cut, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, trials = trials_of(tmp_path / "whole"), trials_of(cut)
    assert [t.params for t in trials] == [t.params for t in whole]
    assert [t.value for t in trials] == [t.value for t in whole]
    assert len(list(cut.glob("runs/s/*/record.json"))) == 7


@pytest.mark.slow
def test_a_comparison_of_real_runs_from_end_to_end(tmp_path):
    done = run(
        tmp_path, "experiment=compare", "data.num_rows=200", "data.batch_size=8",
        "data.num_test_rows=8", "trainer=cpu", "trainer.max_steps=4",
        "trainer.val_check_interval=2", "trainer.enable_progress_bar=false",
        "hydra.sweeper.choices=[lora,dora]", "hydra.sweeper.seeds=[0,1,2]",
        "hydra.sweeper.search.values=[1e-4,1e-3,1e-2]",
        "hydra.sweeper.halving={factor: 2, first: 2}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, final = (
        records_in(tmp_path / "runs/compare_search"),
        records_in(tmp_path / "runs/compare"),
    )
    assert not [r for r in first if any(m.startswith("eval/") for m in r.metrics)]
    assert len(final) == 6
    assert all("eval/mini/exact_match" in r.metrics for r in final)
    assert max(r.started_at for r in first) <= min(r.started_at for r in final)
    for name in ("lora", "dora"):
        rates = {r.config["optim"]["lr"] for r in final if r.choices["lora"] == name}
        means = {}
        for record in first:
            if record.choices["lora"] == name:
                means.setdefault(record.config["optim"]["lr"], []).append(record)
        assert len(means) == 3
        ended = {
            lr: sum(r.metrics["val/kd"] for r in runs)
            for lr, runs in means.items()
            if all(r.status == "ok" for r in runs)
        }
        assert rates == {min(ended, key=ended.get)}
        tokens = {(r.seed, r.num_tokens) for r in final}
        assert len(tokens) == 3  # a seed's runs have seen the same
    assert "pruned" in {r.status for r in first}
    assert "| dora | 3 |" in (tmp_path / "runs/compare/table.md").read_text()
    assert json.loads(json.dumps(final[0].config))["eval_split"] == "test"
