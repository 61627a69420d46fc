"""What python -m neo.cache writes, from a config to a finished folder."""

import sys

import pytest
import torch
from caches import KINDS, NUM_BAD, ROWS, composed, contents, small_shards, typed, write
from lab import tokenizer, write_rows
from transformers import AutoModelForCausalLM

import neo.cache
from neo.cache import split_out, write_cache
from neo.config import ConfigError, resolve
from neo.data.loader import TooManyBadRows
from neo.data.prompt import IGNORE, PromptEncoder
from neo.data.rows import to_conversation
from neo.data.segments import content_of
from neo.teachers.head_file import read_head
from neo.teachers.shards import RowKey
from neo.teachers.store import CacheFolder
from neo.teachers.unpack import given_of, unpacked
from neo.training.cache_job import CacheJob
from neo.training.command_line import console

SLOW = pytest.mark.slow


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "data").mkdir()
    return write_rows(tmp_path / "data" / "rows.jsonl", ROWS)


@pytest.fixture
def typed_for(student_dir, teacher_dir, rows):
    return lambda *more: typed(student_dir, teacher_dir, rows, *more)


def job(overrides, out):
    return CacheJob(resolve(composed(overrides)), out, console)


def examples():
    encoder = PromptEncoder(tokenizer(), 128)
    return {
        i: encoder.encode(to_conversation(row, "prompt_completion"))
        for i, row in enumerate(ROWS)
        if row["completion"]
    }


@torch.no_grad()
def teacher_says(teacher_dir, example):
    """Log-probabilities at the supervised positions, by the model itself."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    return logits[torch.tensor(example.targets) != IGNORE].log_softmax(-1)


@pytest.mark.parametrize(
    "kind", [k if k == "projected" else pytest.param(k, marks=SLOW) for k in KINDS]
)
def test_every_kind_is_written_whole_and_says_what_it_costs(tmp_path, typed_for, kind, capsys):
    with small_shards():
        write(tmp_path / "cache", typed_for(*KINDS[kind]))
    said = capsys.readouterr().err
    cache = CacheFolder.open(tmp_path / "cache")
    manifest, wanted = cache.manifest, examples()
    assert manifest.finished
    assert len(manifest.shards) > 4
    assert sorted(cache.keys()) == [RowKey(0, i) for i in sorted(wanted)]
    assert manifest.counts["bad_rows"] == {"empty": NUM_BAD}
    assert manifest.counts["read"] == len(ROWS)
    for row_id, example in wanted.items():
        row = cache.read(RowKey(0, row_id))
        assert row.num_tokens == sum(target != IGNORE for target in example.targets)
        assert row.content == content_of(example.input_ids, example.targets)
    assert manifest.certificate["rows"] == 16
    assert f"{manifest.certificate['bytes_per_token']:,.1f} bytes a token" in said
    assert f"{NUM_BAD} rows could not be used" in said
    assert not [file for file in contents(tmp_path / "cache") if file.startswith(".")]


@SLOW
def test_what_is_written_is_what_the_teacher_says(tmp_path, typed_for, teacher_dir):
    lists = ("teacher.kind=top_k", f"teacher.k={len(tokenizer())}", "teacher.values=float32")
    for name, overrides in (("hidden", ("teacher.kind=hidden",)), ("lists", lists)):
        write(tmp_path / name, typed_for(*overrides))
        cache = CacheFolder.open(tmp_path / name)
        stored, shapes = cache.manifest.stored, cache.manifest.shapes
        for row_id in (1, 20, 59):
            tensors = unpacked([cache.read(RowKey(0, row_id))], stored, shapes)
            expected = teacher_says(teacher_dir, examples()[row_id])
            head = read_head(cache) if name == "hidden" else None
            given = given_of(tensors, stored, head=head)
            if name == "hidden":
                actual = given.head.logits(given.hidden).log_softmax(-1)
            else:
                actual = torch.empty_like(expected).scatter_(-1, given.ids, given.log_p)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@SLOW
def test_a_finished_cache_is_left_as_it_is_unless_it_is_to_be_written_anew(
    tmp_path, typed_for, capsys
):
    out = tmp_path / "cache"
    write(out, typed_for())
    before = contents(out)
    (out / "shard-00000.index").touch()
    at = (out / "shard-00000.index").stat().st_mtime_ns
    capsys.readouterr()
    write(out, typed_for())
    assert "is finished" in capsys.readouterr().err
    assert (out / "shard-00000.index").stat().st_mtime_ns == at
    (out / "shard-00007.done").touch()  # of a cache that was larger
    write(out, typed_for("rerun=true"))
    assert contents(out) == before


@SLOW
def test_without_a_folder_it_lies_where_runs_look_for_it(typed_for, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cache(composed(typed_for()))
    (folder,) = (tmp_path / "caches").iterdir()
    assert CacheFolder.open(folder).manifest.name == folder.name
    made = job(typed_for(f"teacher.cache={tmp_path / 'other'}"), None)
    assert made.folder == tmp_path / "other" / folder.name


@SLOW
def test_batch_size_packing_and_order_change_neither_the_name_nor_the_rows(tmp_path, typed_for):
    write(tmp_path / "packed", typed_for("teacher.kind=hidden", "data.batch_size=2"))
    more = ("data.packing=false", "data.batch_size=3", "data.shuffle=false", "seed=3")
    write(tmp_path / "alone", typed_for("teacher.kind=hidden", *more))
    one, two = (CacheFolder.open(tmp_path / name) for name in ("packed", "alone"))
    assert one.manifest.name == two.manifest.name
    assert one.keys() == two.keys()
    keys = one.keys()
    for key in keys:
        a, b = (unpacked([c.read(key)], c.manifest.stored, c.manifest.shapes) for c in (one, two))
        torch.testing.assert_close(a["hidden"], b["hidden"])


@SLOW
def test_rows_held_out_of_a_table_are_in_it_and_those_of_their_own_lie_apart(tmp_path, typed_for):
    write(tmp_path / "held", typed_for("data.val_share=0.2"))
    assert len(CacheFolder.open(tmp_path / "held")) == len(ROWS) - NUM_BAD
    mini = ("data.num_rows=12", "data.num_val_rows=5", "data.val_share=0", "data.max_length=256")
    kept = [o for o in typed_for(*mini) if not o.startswith("data.path")]
    write(tmp_path / "mini", ["data=mini", *(o for o in kept if o != "data=jsonl")])
    cache = CacheFolder.open(tmp_path / "mini")
    keys = cache.keys()
    parts = [key.part for key in keys]
    assert [parts.count(part) for part in (0, 1)] == [12, 5]


def stream(rows, *more):
    return (
        "data=infinity_instruct", f"data.path={rows.parent}", "data.name=null",
        "data.schema=prompt_completion", "data.max_rows=1000", "trainer.max_steps=1", *more,
    )  # fmt: skip


@SLOW
def test_a_stream_is_read_to_its_end_and_its_validation_rows_lie_apart(
    tmp_path, student_dir, teacher_dir, rows
):
    overrides = typed(student_dir, teacher_dir, rows, *stream(rows, "data.val_share=0.2"))
    with small_shards():
        write(tmp_path / "cache", overrides)
    cache = CacheFolder.open(tmp_path / "cache")
    counts, wanted = cache.manifest.counts, set(examples())
    keys = cache.keys()
    own = {key.row_id for key in keys if key.part == 0}
    num_val = sum(key.part == 1 for key in keys)
    assert own < wanted
    assert num_val == len(wanted) - len(own) > 0
    assert (counts["read"], counts["read_val_rows"], counts["limit"]) == (60, num_val, 1000)
    write(tmp_path / "cache", overrides)  # knows that it is finished
    assert CacheFolder.open(tmp_path / "cache").manifest == cache.manifest


def test_a_stream_without_a_number_of_rows_is_refused(tmp_path, student_dir, teacher_dir, rows):
    overrides = typed(student_dir, teacher_dir, rows, *stream(rows, "data.max_rows=null"))
    with pytest.raises(ConfigError, match=r"data\.max_rows=null: must be a number"):
        write(tmp_path / "cache", overrides)


def test_dry_run_tells_everything_and_writes_nothing(tmp_path, typed_for, capsys):
    write(tmp_path / "cache", typed_for("dry_run=true"))
    said = capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    tokens = sum(target != IGNORE for e in examples().values() for target in e.targets)
    for wanted in ("projected", "60 in shards of", f"{tokens:,} (counted)", "bytes a token",
                   "in bfloat16", "tokens/s", "are free"):  # fmt: skip
        assert wanted in said, wanted


def test_the_size_that_is_told_is_the_size_it_has(tmp_path, typed_for):
    made = job(typed_for("data.batch_size=64"), tmp_path / "cache")
    found = made.tell()
    made.write()
    size = sum(len(c) for name, c in contents(tmp_path / "cache").items() if "shard" in name)
    assert found.counts.counted
    assert found.num_measured == len(examples())  # so the bytes are those of all
    assert found.num_bytes == size
    assert found.rows_per_shard >= len(ROWS)


@SLOW
def test_tokens_of_many_rows_are_told_from_a_sample(tmp_path, typed_for, monkeypatch):
    monkeypatch.setattr("neo.training.cache_estimate.COUNTED_ROWS", 10)
    monkeypatch.setattr("neo.training.cache_estimate.SAMPLED_ROWS", 20)
    found = job(typed_for(), tmp_path / "cache").tell()
    tokens = sum(target != IGNORE for e in examples().values() for target in e.targets)
    assert not found.counts.counted
    assert found.counts.num_sampled == 20
    assert found.counts.num_tokens == pytest.approx(tokens, rel=0.3)


@SLOW
def test_shards_grow_with_the_rows_and_shrink_with_what_is_kept(tmp_path, typed_for, monkeypatch):
    monkeypatch.setattr("neo.training.cache_estimate.SHARD_BYTES", 10_000)
    of = [
        job(typed_for(*kind), tmp_path / "cache").tell().rows_per_shard
        for kind in (KINDS["hidden"], KINDS["top_k"])
    ]
    assert 1 <= of[0] < of[1] < len(ROWS)


@SLOW
def test_more_bad_rows_than_allowed_end_it(tmp_path, typed_for, monkeypatch):
    with pytest.raises(TooManyBadRows, match=f"data.max_bad_rows=3: {NUM_BAD} of the 60 rows"):
        write(tmp_path / "cache", typed_for("data.max_bad_rows=3"))
    monkeypatch.setattr("neo.training.cache_estimate.COUNTED_ROWS", 10)  # found on the way
    monkeypatch.setattr("neo.training.cache_estimate.SAMPLED_ROWS", 20)
    with small_shards(), pytest.raises(TooManyBadRows, match=r"data\.max_bad_rows=3"):
        write(tmp_path / "cache", typed_for("data.max_bad_rows=3"))
    assert not (tmp_path / "cache" / "manifest.json").exists()


@SLOW
def test_the_same_teacher_at_half_precision_is_kept_as_the_loss_multiplies_it(tmp_path, typed_for):
    half = ("trainer.precision=bf16-mixed", "teacher.kind=hidden")
    write(tmp_path / "cache", typed_for(*half))
    cache = CacheFolder.open(tmp_path / "cache")
    assert cache.manifest.stored.values == "bfloat16"
    (first, *_) = cache.manifest.certificate["measured"]
    assert first["gradient_error"] < 0.1


def run(monkeypatch, *arguments):
    """The command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["neo-cache", *arguments])
    try:
        neo.cache.main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_command_writes_and_refuses(tmp_path, typed_for, monkeypatch, capsys):
    words = [*typed_for("teacher.kind=top_p"), f"out={tmp_path / 'cache'}"]
    assert run(monkeypatch, *words) == 0
    assert (tmp_path / "cache" / "manifest.json").exists()
    for more, told in (
        (["-m"], "a cache is written by one command"),
        (["experiment=mini"], "is a sweep over"),
        (["teacher.kindd=sampled"], "did you mean kind"),
    ):
        assert run(monkeypatch, *words, *more) == 2
        assert told in capsys.readouterr().err, more


def test_what_cannot_be_written_is_refused_before_a_weight_is_read(
    tmp_path, typed_for, monkeypatch
):
    monkeypatch.setattr("neo.training.cache_models.CacheModels.__init__", None)
    for more, told in (
        (["teacher.kind=sampled", "loss=reverse_kl"], r"loss\.divergence=reverse_kl"),
        (["teacher.kind=projected", "lora.modules_to_save=[lm_head]"], "trained or adapted"),
        (["teacher.kind=top_k", "teacher.k=1000"], r"teacher\.k=1000: must be at most"),
        (["trainer=fsdp", "trainer.devices=1"], "trainer=fsdp: processes that share a teacher"),
        (["trainer=ddp", "sharding=teacher"], "sharding=teacher: processes that share"),
        (["method=lora", "teacher.path=null", "loss.kd_ratio=0"], "there is no teacher to run"),
        (["teacher=cached", "teacher.path=x"], "teacher: reads a cache"),
    ):
        overrides = typed_for(*more, "trainer.accelerator=cpu", "trainer.precision=32-true")
        with pytest.raises(ConfigError, match=told):
            write(tmp_path / "cache", overrides)


def test_own_arguments_are_told_from_those_of_a_run():
    assert split_out(["seed=1"]) == (["seed=1"], None)
    with pytest.raises(ConfigError, match="out=: must be a folder"):
        split_out(["out="])
    with pytest.raises(ConfigError, match="one command"):
        split_out(["--multirun", "seed=1,2"])
