import shutil
from dataclasses import replace

import pytest
from fits import fit

from neo.config import ConfigError
from neo.evaluation.candidates import candidates, find_runs, untrained_record
from neo.results.records import read_record, write_record


@pytest.fixture(scope="module")
def experiment(student_dir, teacher_dir, tmp_path_factory):
    """Three runs: two of one base and teacher, one that failed."""
    folder = tmp_path_factory.mktemp("runs") / "main"
    fit(student_dir, teacher_dir, folder / "a", "trainer.max_steps=1", "experiment_name=main")
    shutil.copytree(folder / "a", folder / "b")
    shutil.copytree(folder / "a", folder / "failed")
    write_record(replace(read_record(folder / "a/record.json"), status="oom"), folder / "failed")
    return folder


def names(runs):
    return [run.name for run in runs]


def test_a_run_a_glob_and_an_experiment_name_finished_runs(experiment):
    assert names(find_runs([str(experiment)])) == ["a", "b"]
    assert names(find_runs([str(experiment.parent)])) == ["a", "b"]
    assert names(find_runs([str(experiment / "[ab]*")])) == ["a", "b"]
    assert names(find_runs([str(experiment / "b"), str(experiment)])) == ["b", "a"]


def test_what_is_no_finished_run_is_named_with_the_reason(experiment, tmp_path):
    cut = shutil.copytree(experiment / "a", tmp_path / "cut")
    (cut / "record.json").unlink()
    bare = shutil.copytree(experiment / "a", tmp_path / "bare")
    shutil.rmtree(bare / "adapter")
    (tmp_path / "empty").mkdir()
    for place, reason in {
        experiment / "failed": "its record says 'oom'",
        cut: "holds no record.json; did the run finish",
        bare: "holds neither adapter/ nor model/",
        tmp_path / "empty": "nor holds a finished run",
        tmp_path / "nowhere": "there is no such folder",
        tmp_path / "no*": "no finished run fits this glob",
    }.items():
        with pytest.raises(ConfigError) as refused:
            find_runs([str(place), str(experiment)])
        (problem,) = refused.value.problems
        assert problem.startswith(f"run={str(place)!r}: ")
        assert reason in problem


def test_runs_of_one_base_and_teacher_share_their_records(experiment, student_dir):
    found = candidates(find_runs([str(experiment)]), ["teacher", "base", "student"])
    assert [one.role for one in found] == ["student", "student", "base", "teacher"]
    base = found[2]
    assert base.folder.parent == experiment
    assert base.weights == str(student_dir.resolve())
    assert base.adapter is None
    assert found[0].adapter == experiment / "a" / "adapter"
    record = untrained_record(base, {"started_at": "2026-01-01T00:00:00Z"})
    assert base.folder.name == f"base-{record.run_id}"
    assert record.experiment_name == "main"


def test_another_experiment_has_a_base_of_its_own(experiment, tmp_path):
    copy = shutil.copytree(experiment, tmp_path / "other")
    record = read_record(copy / "a" / "record.json")
    write_record(replace(record, experiment_name="other"), copy / "a")
    one, two = (
        candidates([folder / "a"], ["base"])[0].folder.name for folder in (experiment, copy)
    )
    assert one != two


def test_what_cannot_be_evaluated_is_said_for_every_run_at_once(experiment, tmp_path):
    for name, change in {
        "drawn": ("random_init: false", "random_init: true"),
        "foreign": ("neo.models.causal_lm.CausalLM", "os.system"),
    }.items():
        folder = shutil.copytree(experiment / "a", tmp_path / name)
        config = (folder / "config.yaml").read_text()
        old, new = change
        if old not in config:
            config = config.replace("student:\n", f"student:\n  {new}\n", 1)
        (folder / "config.yaml").write_text(config.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        candidates(find_runs([str(tmp_path)]), ["student"])
    said = str(refused.value)
    assert "the adapter's base was drawn for the run" in said
    assert "_target_='os.system' is not allowed" in said


@pytest.mark.parametrize("roles", [[], ["pupil"], ["student", "pupil"]])
def test_only_students_bases_and_teachers_are_evaluated(experiment, roles):
    with pytest.raises(ConfigError, match="must be some of student, base, teacher"):
        candidates([experiment / "a"], roles)
