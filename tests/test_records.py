import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_runs import example_run
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.results import records
from neo.results.metrics import METRICS
from neo.results.records import (
    RunRecord,
    command_line,
    find_records,
    finite,
    provenance,
    read_record,
    write_record,
)

NUMBERS = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
COUNTS = st.integers(0, 10**12)
# The test makes the record: run-time type checks draw random numbers, a strategy must not.
FIELDS = st.fixed_dictionaries(
    {
        "run_id": st.text(max_size=8),
        "experiment_name": st.text(max_size=8),
        "status": st.sampled_from(records.STATUSES),
        "choices": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
        "overrides": st.lists(st.text(max_size=8), max_size=3),
        "config": st.dictionaries(st.text(max_size=5), PLAIN, max_size=3),
        "seed": st.integers(0, 2**32),
        "started_at": st.just("2026-01-01T00:00:00Z"),
        "error": st.none() | st.text(max_size=8),
        "metrics": st.dictionaries(st.sampled_from(list(METRICS)), NUMBERS, max_size=4),
        "num_parameters": st.none() | COUNTS,
        "num_tokens": st.none() | COUNTS,
        "seconds": st.none() | NUMBERS,
        "peak_memory_gib": st.none() | NUMBERS,
        "rows": st.fixed_dictionaries(
            {"read": COUNTS, "bad": st.dictionaries(st.text(max_size=4), COUNTS)}
        ),
        "dirty": st.none() | st.booleans(),
        "versions": st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
        "argv": st.lists(st.text(max_size=5), max_size=2),
    }
)


@settings(max_examples=40, deadline=None)
@given(fields=FIELDS)
def test_record_to_json_to_record_is_the_identity(fields):
    record = RunRecord(**fields)
    text = record.to_json()
    assert RunRecord.from_json(text) == record
    assert RunRecord.from_json(text).to_json() == text


def test_a_written_record_is_read_back_from_a_folder_that_did_not_exist(tmp_path):
    record = example_run(metrics={"val/ce": 1.5, "eval/mini/exact_match/größe": 0.25})
    path = write_record(record, tmp_path / "runs" / "a")
    assert path == tmp_path / "runs" / "a" / "record.json"
    assert read_record(path) == record


def test_a_missing_number_is_absent_from_the_file():
    known = json.loads(example_run().to_json())
    assert not {"num_tokens", "seconds", "peak_memory_gib", "error", "commit"} & set(known)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["metrics", "config", "seconds"])
def test_nan_and_infinity_are_never_recorded(value, place):
    changes = {
        "metrics": {"metrics": {"val/ce": value}},
        "config": {"config": {"optim": [{"lr": value}]}},
        "seconds": {"seconds": value},
    }[place]
    with pytest.raises(ValueError, match=place):
        example_run(**changes)


def test_finite_leaves_out_what_a_record_must_not_hold():
    assert finite({"val/ce": float("nan"), "val/kd": 0.0, "val/loss": float("inf")}) == {
        "val/kd": 0.0
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 4}, "schema_version.*4.*reads 1, 2, 3"),
        ({"schema_version": None}, "'schema_version' is None"),
        ({"status": "fine"}, "status: 'fine', legal: ok, failed"),
        ({"metrics": {"val/cee": 1.0}}, "unknown metric 'val/cee'.*val/ce"),
        ({"metrics": {"val/ce": "1.0"}}, "(?s)metrics.*val/ce"),
        ({"metrics": {"val/ce": True}}, "(?s)metrics.*val/ce"),
        ({"metrics": []}, "'metrics' is .*not a dict"),
        ({"run_id": 7}, "'run_id' is 7, not a text"),
        ({"seed": 0.5}, "seed"),
        ({"rows": {"lost": 3}}, "rows: unknown .*lost.*legal: read, used, truncated, bad"),
        ({"extra": 1}, "'extra' is unknown"),
    ],
)
def test_an_illegal_file_is_refused_naming_file_and_key(tmp_path, change, message):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(json.loads(example_run().to_json()) | change))
    with pytest.raises(ValueError, match=message) as refused:
        read_record(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "key",
    [
        "schema_version",
        "run_id",
        "experiment_name",
        "status",
        "choices",
        "config",
        "seed",
        "started_at",
    ],
)
def test_a_missing_key_is_refused_naming_file_and_key(tmp_path, key):
    known = json.loads(example_run().to_json())
    del known[key]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=f"'{key}' is missing") as refused:
        read_record(path)
    assert str(path) in str(refused.value)


def test_a_record_of_the_version_before_is_read_and_written_as_it_was():
    known = json.loads(example_run().to_json()) | {"schema_version": 1}
    record = RunRecord.from_json(json.dumps(known))
    assert json.loads(record.to_json()) == known


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1', '{"schema_version": NaN}'])
def test_a_file_that_is_no_json_object_is_refused_naming_it(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"record\.json"):
        read_record(path)


@pytest.mark.parametrize("config", [{1: "a"}, {"a": (1, 2)}, {"a": {"b": Path("x")}}])
def test_a_value_that_json_would_change_is_refused_when_the_record_is_made(config):
    with pytest.raises((ValueError, TypeError), match="config"):
        example_run(config=config)


@pytest.mark.parametrize("crash", ["replace", "fsync"])
def test_a_crash_while_writing_leaves_the_old_record_and_nothing_else(tmp_path, monkeypatch, crash):
    old = example_run(seed=1)
    path = write_record(old, tmp_path)

    def fail(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, crash, fail)
    with pytest.raises(OSError, match="power cut"):
        write_record(example_run(seed=2), tmp_path)
    assert read_record(path) == old
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_the_old_record_is_replaced(tmp_path, monkeypatch):
    seen = []
    real = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append("replace"), real(*paths)))
    write_record(example_run(), tmp_path)
    assert seen == ["fsync", "replace"]


def test_records_are_found_at_any_depth_in_runs_and_in_experiments(tmp_path):
    run = write_record(example_run(), tmp_path / "runs" / "mini" / "a")
    kept = tmp_path / "experiments" / "mini" / "results" / "neo-0-a.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(example_run().to_json())
    (tmp_path / "experiments" / "mini" / "other.json").write_text("{}")
    assert find_records(tmp_path) == sorted([run, kept])
    assert find_records(tmp_path / "nowhere") == []


def test_provenance_fits_into_a_record_and_names_the_device():
    found = provenance()
    assert example_run(**found).device.startswith("cpu: ")
    assert found["versions"]["torch"]
    assert provenance("NVIDIA H100")["device"] == "NVIDIA H100"


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


def test_commit_and_dirty_are_those_of_the_code_and_not_of_its_results(tmp_path):
    (tmp_path / "neo").mkdir()
    (tmp_path / "neo" / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    assert records._code_state(tmp_path) == (None, None)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit, dirty = records._code_state(tmp_path)
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "table.md").write_text("x")
    assert records._code_state(tmp_path) == (commit, False)
    (tmp_path / "neo" / "a.py").write_text("2")
    assert records._code_state(tmp_path) == (commit, True)


def test_a_checkout_around_an_installed_package_is_not_taken_for_its_own(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "somebody else's")
    inside = tmp_path / ".venv" / "site-packages"
    inside.mkdir(parents=True)
    assert records._code_state(inside) == (None, None)


def test_the_recorded_command_names_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = Path(records.__file__).parents[1] / "train.py"
    argv = [
        str(module),
        f"data.path={tmp_path}/rows.jsonl",
        f"student.path={Path.home()}/base",
        "seed=1",
    ]
    assert command_line(argv) == [
        *("python", "-m", "neo.train"),
        *("data.path=rows.jsonl", "student.path=~/base", "seed=1"),
    ]
    assert command_line(["/opt/venv/bin/neo-train", "seed=1"]) == ["neo-train", "seed=1"]


def test_records_are_read_without_torch():
    code = "import sys, neo.results.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
