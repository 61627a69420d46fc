"""What stands in the folder of a cache that is to be written, and is another one."""

import json

import pytest
from caches import ROWS, contents, small_shards, typed, write
from lab import tiny_model, tokenizer, write_rows

from neo.config import ConfigError
from neo.training.cache_standing import remove_cache


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "changed.jsonl", [*ROWS[:-1], {"prompt": "a", "completion": "b"}])
    tiny_model(folder / "student", hidden=32, seed=8)
    tiny_model(folder / "teacher", hidden=48, seed=9)
    template = tokenizer().chat_template
    (folder / "changed.jinja").write_text("{# another #}" + template)
    return folder


@pytest.fixture(scope="module")
def typed_for(place, student_dir, teacher_dir):
    return lambda *more: typed(student_dir, teacher_dir, place / "rows.jsonl", *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, typed_for):
    out = tmp_path_factory.mktemp("finished") / "cache"
    write(out, typed_for())
    return out


CHANGES = {
    "teacher": ("teacher.path={}/teacher", "teacher.hash: the cache has"),
    "student head": ("student.path={}/student", "student_head.sha256: the cache has"),
    "template": ("data.chat_template={}/changed.jinja", "chat_template: the cache has"),
    "data": ("data.path={}/changed.jsonl", "data.hash: the cache has"),
    "length": ("data.max_length=100", "rules.max_length: the cache has 128, the run has 100"),
    "temperature": ("loss.temperature=2", "stored.temperature: the cache has 1.0, the run has 2.0"),
    "kind": ("teacher.kind=hidden", 'stored.kind: the cache has "projected"'),
    "quantised": ("teacher.dtype=bfloat16", 'teacher.dtype: the cache has "float32"'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_cache_is_refused_with_what_differs(place, typed_for, finished, change):
    override, told = CHANGES[change]
    before = contents(finished)
    with pytest.raises(ConfigError, match="holds another cache") as refused:
        write(finished, typed_for(override.format(place)))
    assert told in str(refused.value)
    assert contents(finished) == before


def test_what_changes_no_target_is_no_other_cache(typed_for, finished, capsys):
    write(finished, typed_for("lora.r=8", "optim.lr=0.0001", "data.batch_size=5", "seed=4"))
    assert "is finished" in capsys.readouterr().err


def test_rows_that_a_finished_cache_lacks_are_told(typed_for, tmp_path):
    out = tmp_path / "cache"
    write(out, typed_for("data.max_rows=20"))
    with pytest.raises(ConfigError, match=r"is finished, and lacks \d+ of these 60 rows"):
        write(out, typed_for())


def test_an_unfinished_cache_of_other_rows_is_refused(typed_for, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    with small_shards(), monkeypatch.context() as patch:
        patch.setattr("neo.training.cache_job.finish", broken)
        with pytest.raises(ZeroDivisionError):
            write(out, typed_for())
    with pytest.raises(ConfigError, match="was begun with other rows"):
        write(out, typed_for("data.max_rows=20"))


def broken(*_):
    raise ZeroDivisionError


def test_a_folder_that_is_no_cache_is_left_alone(typed_for, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for more in ((), ("rerun=true",)):
        with pytest.raises(ConfigError, match=r"thesis\.tex"):
            write(tmp_path, typed_for(*more))
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}
    (tmp_path / "shard-00000.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"here lies thesis\.tex"):
        remove_cache(tmp_path)


def test_a_damaged_manifest_is_told(typed_for, finished, tmp_path):
    out = tmp_path / "cache"
    out.mkdir()
    for name, content in contents(finished).items():
        (out / name).write_bytes(content)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"name": "x"}))
    with pytest.raises(ConfigError, match="is damaged"):
        write(out, typed_for())
    write(out, typed_for("rerun=true"))
    assert contents(out) == contents(finished)
