"""A search through the sweeper: what it refuses, what it runs, how it goes on."""

import json
import math
import sys
from pathlib import Path

import pytest
from sweepers import start

pytest.importorskip("optuna")

from neo.config import ConfigError
from neo.training.search import Search, corners
from neo.training.space import Choices, Numbers
from neo.training.sweep import SweepFailed

KEYS = {
    "params": {"optim.lr": "tag(log,interval(1e-5,1.0))", "lora.r": "choice(4,8)"},
    "n_trials": 6,
    "sampler": {"name": "tpe", "n_startup_trials": 3},
}
SHARED = ("experiment_name=s", "trainer=cpu")


def kd_of(config):
    """Best at a rate of 0.01."""
    return "ok", {"val/kd": abs(math.log10(config["optim"]["lr"]) + 2) + config["lora"]["r"] / 100}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def search(keys=(), *arguments, came=kd_of):
    return start(Search, KEYS | dict(keys), came, *SHARED, *arguments)


def trials_of(study="s"):
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend("runs/s/optuna.journal"))
    return optuna.load_study(study_name=study, storage=storage).trials


@pytest.mark.parametrize(
    ("keys", "arguments", "problem"),
    [
        ({"metric": "val/kdd"}, (), "metric: unknown metric 'val/kdd': did you mean val/kd"),
        ({"metric": "train/loss"}, (), "metric=train/loss: is not measured on rows that are held"),
        ({"metric": "val/student_entropy"}, (), "metric=val/student_entropy: has no better end"),
        ({"n_trials": None}, (), "n_trials: missing; sampler=grid alone has an end"),
        ({"n_trials": 0}, (), "n_trials=0: must be an integer of at least 1"),
        ({"n_jobs": 1.5}, (), "n_jobs=1.5: must be an integer"),
        ({"seed": -1}, (), "seed=-1: must be an integer of at least 0"),
        ({"seeds": [1, 1]}, (), r"seeds=\[1, 1\]: each once"),
        ({"seeds": 3}, (), "seeds=3: must be a list of integers"),
        ({"storage": 3}, (), "storage=3: must be a text"),
        ({"storage": "nosuch://x"}, (), "storage=nosuch://x: "),
        ({"sampler": "cmaes"}, (), "sampler='cmaes': must be tpe, random, grid"),
        ({"sampler": {"name": "tpe", "n_startup": 1}}, (), "sampler.n_startup: no option of tpe"),
        ({"sampler": {"n_startup_trials": 1}}, (), "sampler={.*}: must be tpe"),
        ({"pruner": "medain"}, (), "pruner='medain': must be median, successive_halving, hyper"),
        ({"pruner": {"name": "median", "n_warmup_steps": -1}}, (), "pruner={.*cannot be negative"),
        ({"params": {}}, (), "params: nothing is searched"),
        ({"params": {"optim.lr": "interval(1,0)"}}, (), "optim.lr: from 1 to 0"),
        ({"params": {"optim.lr": "interval(0,1)"}, "sampler": "grid"}, (), "cannot be listed"),
        ({}, ("seed=0,1",), "seed: a trial's seeds are given by seeds"),
        ({"seeds": [0, 1]}, ("seed=3",), "seed: a trial's seeds are given by seeds"),
        ({}, ("experiment_name=a,b",), "experiment_name: one for all trials"),
        ({}, ("optim.lrr=choice(1,2)",), "lrr: not a key"),
        ({}, ("lora.r=choice(4,0)",), r"lora\.r=0"),  # of one choice alone
        ({}, ("lora=choice(lora,lorra)",), "lorra"),
        ({}, ("eval_split=test",), "eval_split=test: a search answers no test rows"),
        ({}, ("rerun=true",), "rerun=true: trials are told once"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(keys, arguments, problem, tmp_path):
    with pytest.raises(Exception, match=problem) as refused:
        search(keys, *arguments)
    assert refused.value.sweeper.ran == []
    assert not list(tmp_path.rglob("record.json"))


def test_all_that_is_wrong_with_the_keys_is_named_at_once():
    with pytest.raises(ConfigError) as refused:
        search({"metric": "kd", "n_trials": 0, "sampler": "x", "params": {"optim.lr": "1,1"}})
    assert len(refused.value.problems) == 4


def test_the_corners_of_a_space_have_every_choice_and_both_ends():
    space = {"a": Choices(("x", "y", "z")), "b": Numbers(1, 5, step=1)}
    assert corners(space) == [
        {"a": "x", "b": 1}, {"a": "y", "b": 1}, {"a": "z", "b": 1}, {"a": "x", "b": 5}
    ]  # fmt: skip


def test_the_best_trial_is_written_as_it_can_be_typed(tmp_path):
    sweeper = search()
    best = min(sweeper.ran, key=lambda job: kd_of(job.config)[1]["val/kd"])
    lr, r = best.config["optim"]["lr"], best.config["lora"]["r"]
    assert (tmp_path / "runs/s/chosen.txt").read_text() == f"optim.lr={lr} lora.r={r}\n"
    assert len(sweeper.ran) == 6
    search()  # nothing is left to do
    assert len(trials_of()) == 6


@pytest.mark.parametrize("stop", [2, 4])
def test_a_search_that_is_killed_in_a_trial_goes_on_with_it(tmp_path, monkeypatch, stop):
    search()
    whole = [trial.params for trial in trials_of()]
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)

    def killed(config):
        nonlocal stop
        stop -= 1
        if stop < 0:
            raise KeyboardInterrupt
        return kd_of(config)

    with pytest.raises(KeyboardInterrupt):
        search(came=killed)
    done = len(list(other.glob("runs/s/*/record.json")))
    assert done < 6
    sweeper = search()
    assert [trial.params for trial in trials_of()] == whole
    assert len(sweeper.ran) == 6 - done
    assert all(trial.state.name == "COMPLETE" for trial in trials_of())


def test_a_trial_that_was_recorded_but_not_told_is_not_run_again(monkeypatch):
    from neo.training.study import Trials

    with monkeypatch.context() as patch:
        patch.setattr(Trials, "tell", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            search()
    assert len(search().ran) == 5
    assert len(trials_of()) == 6


def test_the_value_of_a_trial_is_the_mean_over_its_seeds():
    def came(config):
        return "ok", {"val/kd": float(config["seed"])}

    sweeper = search({"seeds": [100, 104], "n_trials": 2}, came=came)
    assert [job.config["seed"] for job in sweeper.ran] == [100, 104, 100, 104]
    assert [trial.value for trial in trials_of()] == [102.0, 102.0]


def test_the_first_seed_decides_whether_the_others_are_run():
    def came(config):
        place = config["prune"]
        assert (place is not None) == (config["seed"] == 100)
        if place is not None:
            assert place == {"storage": "runs/s/optuna.journal", "study": "s",
                             "trial": place["trial"]}  # fmt: skip
            if place["trial"] == 1:
                return "pruned", {"val/kd": 0.1}
        return "ok", {"val/kd": 0.5}

    sweeper = search({"seeds": [100, 101, 102], "n_trials": 3, "pruner": "median"}, came=came)
    seeds = [job.config["seed"] for job in sweeper.ran]
    assert seeds == [100, 101, 102, 100, 100, 101, 102]
    assert [trial.state.name for trial in trials_of()] == ["COMPLETE", "PRUNED", "COMPLETE"]


def test_several_trials_are_run_at_a_time():
    sweeper = start(Search, KEYS | {"n_jobs": 4}, kd_of, *SHARED)
    assert len(sweeper.ran) == 6
    states = [(trial.number, trial.state.name) for trial in trials_of()]
    assert states == [(i, "COMPLETE") for i in range(6)]


def test_a_search_tells_failures_from_what_it_finds_out():
    def came(config):
        return ("diverged", {}) if config["optim"]["lr"] > 0.01 else kd_of(config)

    search(came=came)  # a rate that diverges is a finding
    told = trials_of()
    diverged = [trial for trial in told if trial.params["optim.lr"] > 0.01]
    assert diverged
    assert all(trial.state.name == "PRUNED" for trial in diverged)


def test_a_search_with_failures_says_so_and_tries_them_again_when_asked_to():
    fail = True

    def came(config):
        bad = fail and config["lora"]["r"] == 8
        return ("failed", {}) if bad else kd_of(config)

    with pytest.raises(SweepFailed, match=r"of 6 trials have failed; retry=failed"):
        search(came=came)
    num = sum(trial.state.name == "FAIL" for trial in trials_of())
    assert num
    fail = False
    for record in Path("runs").rglob("record.json"):
        if json.loads(record.read_text())["status"] == "failed":
            record.unlink()  # as the sweep does for retry=failed
    sweeper = search({}, "retry=failed", came=came)
    assert len(sweeper.ran) == num
    assert sum(trial.state.name == "COMPLETE" for trial in trials_of()) == 6


def test_a_metric_that_no_run_has_stops_the_search_at_the_first():
    with pytest.raises(SweepFailed, match=r"metric=val/kd: run \w+ has none; it has val/ce") as no:
        search(came=lambda config: ("ok", {"val/ce": 1.0}))
    assert len(no.value.sweeper.ran) == 1


def test_values_that_do_not_go_together_fail_their_trial_alone():
    keys = {"params": {"optim.lr": "1e-3,1e-2", "lora.r": "4,8"}, "sampler": "grid",
            "n_trials": None}  # fmt: skip

    class Picky(Search):
        def check(self, jobs):
            if any({"++optim.lr=0.01", "++lora.r=8"} <= set(job) for job in jobs):
                raise ConfigError(["these do not go together"])
            return super().check(jobs)

    with pytest.raises(SweepFailed, match="1 of 4 trials have failed") as failed:
        start(Picky, KEYS | keys, kd_of, *SHARED)
    assert len(failed.value.sweeper.ran) == 3
    assert [t.state.name for t in trials_of()] == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]


def test_a_study_that_was_begun_with_other_rows_is_not_gone_on_with():
    search()
    with pytest.raises(ConfigError, match=r"study 's' in .* was begun otherwise: run: "):
        search({}, "data.num_rows=500")


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs Optuna: pip install 'llm-neo\[sweeps\]'"):
        search()
