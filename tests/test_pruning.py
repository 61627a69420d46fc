"""Runs that are trials: what they report, and how one that is hopeless ends."""

import subprocess
import sys

import pytest
from devices import environment
from fits import fit, history, power_cut, settings
from lab import ROWS, write_rows

pytest.importorskip("optuna")

from neo.config import ConfigError
from neo.results.records import read_record
from neo.training.pruning import Pruned, prune_problems
from neo.training.space import Numbers
from neo.training.study import StudySpec, Trials

SPEED = (
    "data.batch_size=2", "data.packing=false", "data.val_share=0.3", "optim.lr=0.01",
    "trainer.max_steps=8", "trainer.max_epochs=-1", "trainer.val_check_interval=2",
)  # fmt: skip


@pytest.fixture
def study(tmp_path):
    """A study of two trials that ended well, and a third for the run."""
    spec = StudySpec(
        name="s",
        storage=str(tmp_path / "s.journal"),
        metric="val/kd",
        space={"optim.lr": Numbers(1e-4, 0.1)},
        sampler={"name": "random"},
        pruner={"name": "median", "n_startup_trials": 2},
    )
    return Trials(spec, tmp_path, 3)


def others(study, kd):
    """What two other trials had, by step; then the trial of the run, as it is typed."""
    for trial in study.ask(2):
        trial_id = study.storage.get_trial_id_from_study_id_trial_number(study._id, trial.number)
        for step, value in kd.items():
            study.storage.set_trial_intermediate_value(trial_id, step, value)
        study.tell(trial, "ok", 0.1, None)
    (mine,) = study.ask(1)
    return f"prune={{storage:'{study.spec.storage}',study:s,trial:{mine.number}}}"


def reported(study):
    return study.study.trials[2].intermediate_values


def steps(folder):
    return [int(path.stem[5:]) for path in (folder / "checkpoints").glob("*.ckpt")]


def test_a_hopeless_run_ends_behind_its_validation_with_a_checkpoint_and_the_reason(
    study, student_dir, teacher_dir, tmp_path
):
    prune = others(study, {2: 99.0, 4: 1e-6, 6: 99.0})
    with pytest.raises(Pruned) as stopped:
        fit(student_dir, teacher_dir, tmp_path / "run", *SPEED, prune)
    assert stopped.value.code == 0
    record = read_record(tmp_path / "run" / "record.json")
    assert record.status == "pruned"
    assert record.error == f"Pruned: {stopped.value}"
    values = reported(study)
    assert list(values) == [2, 4]
    assert f"at step 4: val/kd {values[4]:.4g}, where 2 other trials" in record.error
    assert steps(tmp_path / "run") == [4]
    assert not (tmp_path / "run" / "adapter").exists()
    # it is recorded, as one that came to its end is; and the search makes no other run of it
    assert fit(student_dir, teacher_dir, tmp_path / "run", *SPEED) == record


def test_a_run_that_does_well_reports_every_validation_and_comes_to_its_end(
    study, student_dir, teacher_dir, tmp_path
):
    prune = others(study, {2: 99.0, 4: 99.0, 6: 99.0, 8: 1e-6})
    record = fit(student_dir, teacher_dir, tmp_path / "run", *SPEED, prune)
    assert record.status == "ok"  # a run without a step left is not hopeless
    assert list(reported(study)) == [2, 4, 6, 8]
    logged = history(tmp_path / "run", "val/kd")  # which has the one behind the last step, too
    assert list(reported(study).values()) == pytest.approx(logged[:4], rel=1e-6)
    assert reported(study)[8] == record.metrics["val/kd"]


def test_a_run_that_was_stopped_reports_as_if_it_never_had(
    study, student_dir, teacher_dir, tmp_path
):
    prune = others(study, {8: 1.0})
    often = "checkpoint_every_n_steps=3"
    with power_cut(5):
        fit(student_dir, teacher_dir, tmp_path / "run", *SPEED, prune, often)
    before = dict(reported(study))
    assert list(before) == [2, 4]
    fit(student_dir, teacher_dir, tmp_path / "run", *SPEED, prune, often)  # from step 3
    assert list(reported(study)) == [2, 4, 6, 8]
    assert {step: reported(study)[step] for step in before} == before


def test_steps_are_those_of_the_optimizer(study, student_dir, teacher_dir, tmp_path):
    prune = others(study, {8: 1.0})
    fit(student_dir, teacher_dir, tmp_path / "run", *SPEED, prune, "trainer.max_steps=3",
        "trainer.accumulate_grad_batches=2")  # fmt: skip
    assert list(reported(study)) == [1, 2]


def test_a_verdict_holds_for_a_run_that_was_killed_before_its_record(
    study, student_dir, teacher_dir, tmp_path
):
    prune = others(study, {8: 1.0})
    trial_id = study.storage.get_trial_id_from_study_id_trial_number(study._id, 2)
    study.storage.set_trial_user_attr(trial_id, "pruned", "at step 4: too bad")
    with pytest.raises(Pruned, match="at step 4: too bad"):
        fit(student_dir, teacher_dir, tmp_path / "run", *SPEED, prune)
    assert steps(tmp_path / "run") == [1]


def test_a_metric_that_the_run_does_not_measure_is_named(study, student_dir, tmp_path):
    prune = others(study, {})
    with pytest.raises(ValueError, match=r"metric=val/kd: this run validates val/ce, val/loss"):
        fit(student_dir, None, tmp_path / "run", "method=lora", *SPEED, prune)


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("x", "prune='x': must be null, or a mapping of storage, study, trial"),
        ({"storage": "x"}, "must be null, or a mapping"),
        ({"storage": "x", "study": "y", "trial": "0"}, "prune.trial='0': must be an integer"),
        ({"storage": None, "study": "y", "trial": 0}, "prune.storage=None: must be a text"),
    ],
)
def test_a_place_that_is_none_is_refused(place, problem):
    (found,) = prune_problems(place)
    assert problem in found


def test_it_is_refused_before_anything_is_loaded(student_dir, tmp_path):
    with pytest.raises(ConfigError, match="prune='x'"):
        fit(student_dir, None, tmp_path / "run", "method=lora", "prune=x")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_all_processes_of_a_hopeless_run_stop_at_one_step(
    study, student_dir, teacher_dir, tmp_path
):
    prune = others(study, {2: 1e-6})
    run, rows = tmp_path / "run", write_rows(tmp_path / "rows.jsonl", 4 * ROWS)
    overrides = settings(student_dir, teacher_dir, run, *SPEED, prune, "trainer.strategy=ddp",
                         "trainer.devices=2", f"data.path={rows}")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "neo.train", *overrides],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = read_record(run / "record.json")
    assert record.status == "pruned"
    assert "at step 2: val/kd" in record.error
    assert list(reported(study)) == [2]
    assert steps(run) == [2]
