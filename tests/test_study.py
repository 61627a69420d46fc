"""The trials of a study: asked for once, told once, whoever dies in between."""

import multiprocessing
import subprocess
import sys
from dataclasses import replace

import pytest
from filelock import FileLock

pytest.importorskip("optuna")

from neo.training.optuna_parts import PRUNERS, SAMPLERS, named, open_storage
from neo.training.reports import Reports
from neo.training.space import Choices, Numbers
from neo.training.study import StudySpec, Trials

SPACE = {"optim.lr": Numbers(1e-5, 1.0, log=True), "lora": Choices(("lora", "dora"))}
PLACES = ("journal", "sqlite")


def spec(folder, place="journal", **changes):
    storage = f"sqlite:///{folder}/s.db" if place == "sqlite" else str(folder / "s.journal")
    known = {"name": "s", "storage": storage, "metric": "val/kd", "space": SPACE,
             "sampler": {"name": "tpe", "n_startup_trials": 3}, "seed": 1}  # fmt: skip
    return StudySpec(**known | changes)


def loss(point):
    return abs(point["optim.lr"] - 0.01) + (point["lora"] == "dora")


def search(trials, most=1, stop=None):
    """Runs a search; stops by an error before it tells the trial of that number."""
    while asked := trials.ask(most):
        for trial in asked:
            if trial.number == stop:
                raise KeyboardInterrupt
            trials.tell(trial, "ok", loss(trial.point), None)
    return trials.told()


@pytest.mark.parametrize("place", PLACES)
def test_a_search_that_dies_asks_for_the_same_trials_as_one_that_does_not(tmp_path, place):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = search(Trials(spec(tmp_path / "whole", place), tmp_path / "whole", 8))
    for stop in (2, 5):  # among the random ones, and among those of the sampler
        with pytest.raises(KeyboardInterrupt):
            search(Trials(spec(tmp_path / "cut", place), tmp_path / "cut", 8), stop=stop)
    trials = Trials(spec(tmp_path / "cut", place), tmp_path / "cut", 8)
    assert [t.status for t in trials.told()] == 5 * ["ok"] + ["running"]
    assert search(trials) == whole
    assert len(whole) == 8
    assert len({trial.point["optim.lr"] for trial in whole}) == 8
    assert trials.best() == min(whole, key=lambda trial: trial.value)


def test_a_trial_is_asked_for_by_one_search_at_a_time(tmp_path):
    first, second = (Trials(spec(tmp_path), tmp_path, 5) for _ in range(2))
    (a,), b = first.ask(1), second.ask(3)
    assert [a.number, *(t.number for t in b)] == [0, 1, 2, 3]
    first.tell(a, "ok", 0.5, None)
    for trial in b:
        second.tell(trial, "ok", 0.6, None)
    assert [t.number for t in first.ask(9)] == [4]
    assert second.ask(9) == []  # the fifth is under way elsewhere


def test_a_trial_whose_parameters_were_never_drawn_is_drawn_when_it_is_found(tmp_path):
    trials = Trials(spec(tmp_path), tmp_path, 2)
    expected = Trials(spec(tmp_path, name="other"), tmp_path, 2).ask(1)[0].point
    trials.study.ask()  # and then it died
    (found,) = trials.ask(1)
    assert (found.number, found.point) == (0, expected)


def test_two_processes_share_the_trials_of_one_study(tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "import test_study as t;"
        "f = Path(sys.argv[1]); [print(len(t.search(t.Trials(t.spec(f), f, 12))))]"
    )
    folder = __file__.rpartition("/")[0]
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), folder]) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    told = Trials(spec(tmp_path), tmp_path, 12).told()
    assert [(t.number, t.status) for t in told] == [(i, "ok") for i in range(12)]
    assert len({t.point["optim.lr"] for t in told}) == 12


def hold(folder, ready, end):
    trials = Trials(spec(folder), folder, 3)
    trials.ask(2)
    ready.set()
    end.wait(60)


def test_the_trials_of_a_killed_process_are_handed_out_again_and_those_of_a_live_one_are_not(
    tmp_path,
):
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, end))
    process.start()
    assert ready.wait(60)
    trials = Trials(spec(tmp_path), tmp_path, 3)
    assert [t.number for t in trials.ask(9)] == [2]
    process.kill()
    process.join()
    assert [t.number for t in trials.ask(9)] == [0, 1]


def test_what_was_at_fault_counts_as_worse_than_all_that_ended_and_a_failure_counts_nothing(
    tmp_path,
):
    trials = Trials(spec(tmp_path), tmp_path, 5)
    statuses = ["ok", "failed", "oom", "diverged", "pruned"]
    for trial, status in zip(trials.ask(5), statuses, strict=True):
        trials.tell(trial, status, 0.5 if status == "ok" else None, f"it {status}")
    assert [t.status for t in trials.told()] == statuses
    assert [t.value for t in trials.told()] == [0.5, None, None, None, None]
    assert [t.state.name for t in trials.study.trials] == [
        "COMPLETE", "FAIL", "PRUNED", "PRUNED", "PRUNED"
    ]  # fmt: skip
    assert trials.best().number == 0
    assert trials.told()[3].error == "it diverged"


def test_an_interrupted_trial_is_left_for_the_next_start(tmp_path):
    trials = Trials(spec(tmp_path), tmp_path, 2)
    (asked,) = trials.ask(1)
    trials.tell(asked, "interrupted", None, "SIGTERM")
    (other,) = trials.ask(9)  # not the same again, which would never end
    trials.tell(other, "ok", 1.0, None)
    (again,) = Trials(spec(tmp_path), tmp_path, 2).ask(9)
    assert again.point == asked.point


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_failed_trials_are_tried_again_when_it_is_asked_for(tmp_path, sampler):
    space = {"lora": SPACE["lora"], "lora.r": Choices(("4", "8"))}
    made = spec(tmp_path, space=space, sampler={"name": sampler})
    trials = Trials(made, tmp_path, 3)
    first = trials.ask(9)
    for trial, status in zip(first, ["failed", "ok", "diverged"], strict=True):
        trials.tell(trial, status, 1.0 if status == "ok" else None, None)
    trials = Trials(made, tmp_path, 3)
    assert trials.ask(9) == []
    assert trials.retry() == 2
    assert trials.retry() == 0  # they are in the queue already
    again = trials.ask(9)
    assert [t.point for t in again] == [first[0].point, first[2].point]
    for trial in again:
        trials.tell(trial, "failed", None, None)
    assert trials.ask(9) == []
    assert trials.retry() == 2


def test_a_grid_is_gone_through_once_and_goes_on_where_it_stopped(tmp_path):
    space = {"lora.r": Numbers(2, 6, step=2), "lora": SPACE["lora"]}
    made = spec(tmp_path, space=space, sampler={"name": "grid"})
    some = Trials(made, tmp_path, 2)
    assert [t.point["lora.r"] for t in some.ask(9)] == [2, 2]
    del some
    trials = Trials(made, tmp_path, None)
    points = [trials.ask(1)[0] for _ in range(6)]
    assert trials.ask(1) == []
    assert sorted((t.point["lora.r"], t.point["lora"]) for t in points) == [
        (r, lora) for r in (2, 4, 6) for lora in ("dora", "lora")
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "val/ce"}, "metric: 'val/kd' then, 'val/ce' now"),
        ({"space": {"lora": SPACE["lora"]}}, "space: "),
        ({"shared": {"seeds": [1]}}, r"seeds: None then, \[1\] now"),
        ({"pruner": {"name": "median"}}, "pruner: None then"),
    ],
)
def test_a_study_of_other_settings_is_not_gone_on_with(tmp_path, changes, said):
    made = spec(tmp_path)
    Trials(made, tmp_path, 2)
    with pytest.raises(ValueError, match=f"was begun otherwise: {said}.*Choose another"):
        Trials(replace(made, **changes), tmp_path, 2)
    Trials(made, tmp_path, 5)  # more trials are no other study


def test_a_metric_that_should_rise_is_maximised(tmp_path):
    trials = Trials(spec(tmp_path, metric="val/agreement"), tmp_path, 2)
    for trial, value in zip(trials.ask(2), (0.2, 0.7), strict=True):
        trials.tell(trial, "ok", value, None)
    assert trials.best().value == 0.7
    assert trials.study.best_value == 0.7


def reports_of(made, number):
    return Reports(made.storage, made.name, number)


@pytest.mark.parametrize("place", PLACES)
def test_a_trial_worse_than_the_median_of_others_is_told_to_end_and_why(tmp_path, place):
    pruner = {"name": "median", "n_startup_trials": 3}
    made = spec(tmp_path, place, pruner=pruner)
    trials = Trials(made, tmp_path, 4)
    for trial, kd in zip(trials.ask(3), (0.3, 0.2, 0.4), strict=True):
        reports = reports_of(made, trial.number)
        assert reports.report(10, kd) is None
        assert reports.report(20, kd) is None
        trials.tell(trial, "ok", kd, None)
    (last,) = trials.ask(1)
    reports = reports_of(made, last.number)
    assert reports.metric == "val/kd"
    assert reports.report(10, 0.3) is None
    assert reports.verdict() is None
    said = reports.report(20, 0.9)
    # the best that a trial has ever had is what Optuna compares
    assert said is None
    last_of_all = Trials(made, tmp_path, 5).ask(1)[0]
    said = reports_of(made, last_of_all.number).report(20, 0.9)
    assert said == (
        "at step 20: val/kd 0.9, where 4 other trials had a median of 0.35 and a best of 0.2 "
        "(median)"
    )
    assert reports_of(made, last_of_all.number).verdict() == said


def test_a_step_that_was_reported_before_a_stop_is_not_reported_again(tmp_path):
    made = spec(tmp_path, pruner={"name": "successive_halving", "min_resource": 5})
    trials = Trials(made, tmp_path, 1)
    (trial,) = trials.ask(1)
    reports_of(made, trial.number).report(10, 0.5)
    reports_of(made, trial.number).report(10, 0.1)
    assert trials.study.trials[0].intermediate_values == {10: 0.5}


def test_a_value_that_is_no_number_ends_a_trial(tmp_path):
    made = spec(tmp_path, pruner={"name": "successive_halving", "min_resource": 5})
    (trial,) = Trials(made, tmp_path, 1).ask(1)
    said = reports_of(made, trial.number).report(10, float("nan"))
    assert said.startswith("at step 10: val/kd nan, where there are no others to compare with")


def test_a_journal_whose_last_line_was_torn_is_read_without_it(tmp_path):
    made = spec(tmp_path)
    assert Trials(made, tmp_path, 2).ask(1)
    journal = tmp_path / "s.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":6,"worker_')
    trials = Trials(made, tmp_path, 2)
    (trial,) = trials.ask(1)
    trials.tell(trial, "ok", 0.5, None)
    assert [t.value for t in Trials(made, tmp_path, 2).told()] == [0.5]


def test_a_lock_that_a_killed_process_left_on_the_journal_is_broken(tmp_path, monkeypatch):
    from optuna.storages.journal import JournalFileOpenLock

    made = spec(tmp_path, storage="s.journal")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.journal.lock").touch()
    init = JournalFileOpenLock.__init__
    monkeypatch.setattr(JournalFileOpenLock, "__init__", lambda self, path: init(self, path, 3))
    assert Trials(made, tmp_path, 2).ask(1)


def test_a_place_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"storage=.*x\.journal: there is no such journal"):
        open_storage(str(tmp_path / "x.journal"), there=True)
    with pytest.raises(ValueError, match=r"storage=nosuch://x: "):
        open_storage("nosuch://x")


def test_samplers_and_pruners_are_named_with_their_options():
    legal = {name: options for name, (_, options) in PRUNERS.items()}
    assert named("sampler", "random", SAMPLERS) == {"name": "random"}
    given = {"name": "median", "n_warmup_steps": 3}
    assert named("pruner", given, legal) == given
    with pytest.raises(ValueError, match="sampler='cmaes': must be tpe, random, grid"):
        named("sampler", "cmaes", SAMPLERS)
    with pytest.raises(
        ValueError, match=r"n_warmup: no option of median \(did you mean n_warmup_s"
    ):
        named("pruner", {"name": "median", "n_warmup": 3}, legal)


def test_the_lock_of_the_study_is_held_while_trials_are_asked_for(tmp_path):
    trials = Trials(spec(tmp_path), tmp_path, 2)
    with FileLock(tmp_path / ".trials" / "s.lock"):
        trials.lock.timeout = 0
        with pytest.raises(TimeoutError):
            trials.ask(1)
