"""Runs that read a cache train what runs beside the teacher do, and refuse what is not theirs."""

import json
import subprocess
import sys

import pytest
import torch
from devices import IN_ORDER, environment, train_in_processes
from devices import assert_same as assert_same_weights
from fits import ROWS, fit, power_cut, settings, trained
from lab import compose_raw, tiny_model
from test_variant_laws import BRANCHES, QUANTIZED

from neo.config import ConfigError
from neo.train import train

STEPS = ("trainer.max_epochs=-1", "trainer.max_steps=20", "optim.lr=1e-2", "data.batch_size=4")
NUM_ROWS = 8  # of messages.jsonl that can be trained on


def auto(folder, *overrides):
    return (f"teacher.cache={folder}", *overrides)


def cached(folder):
    (one,) = folder.iterdir()
    return ("teacher=cached", f"teacher.path={one}")


def norm_of_difference(actual, expected):
    pairs = [(actual[name].double(), value.double()) for name, value in expected.items()]
    off = sum(((a - b) ** 2).sum() for a, b in pairs) ** 0.5
    return float(off / sum((b**2).sum() for _, b in pairs) ** 0.5)


def online_and_cached(student_dir, teacher_dir, folder, *overrides):
    """What a run beside the teacher trains, one that fills a cache, and one that reads it."""
    records = [
        fit(student_dir, teacher_dir, folder / "online", *STEPS, *overrides),
        fit(student_dir, teacher_dir, folder / "first", *STEPS, *auto(folder / "c"), *overrides),
        fit(student_dir, None, folder / "read", *STEPS, *overrides, *cached(folder / "c")),
    ]
    assert [record.status for record in records] == ["ok"] * 3
    return records, [trained(folder / name) for name in ("online", "first", "read")]


def test_twenty_steps_from_a_cache_train_the_adapter_of_the_teacher_itself(
    student_dir, teacher_dir, tmp_path
):
    records, (online, first, read) = online_and_cached(student_dir, teacher_dir, tmp_path)
    assert norm_of_difference(first, online) < 1e-5
    assert norm_of_difference(read, online) < 1e-5
    assert_same_weights(read, first, atol=0.0)
    assert records[1].metrics["cache/rows_computed"] == records[1].rows["used"]
    assert records[2].metrics["cache/rows_computed"] == 0
    assert records[2].metrics["cache/rows_read"] >= 20 * 4
    assert records[2].metrics["cache/gradient_error"] < 1e-4
    assert records[2].models["teacher"]["hash"] == records[0].models["teacher"]["hash"]


def test_a_run_whose_cache_cannot_be_measured_is_a_good_run(
    student_dir, teacher_dir, tmp_path, monkeypatch, capfd
):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("neo.training.cache_report.certify", out_of_memory)
    record = fit(
        student_dir, teacher_dir, tmp_path / "a", *STEPS, "trainer.max_steps=2",
        *auto(tmp_path / "c"),
    )  # fmt: skip
    assert record.status == "ok"
    assert "cache/gradient_error" not in record.metrics
    assert "could not be measured: no room" in " ".join(capfd.readouterr().err.split())
    monkeypatch.undo()
    record = fit(student_dir, teacher_dir, tmp_path / "b", *STEPS, *auto(tmp_path / "c"))
    assert ("cache/gradient_error" in record.metrics) is (record.metrics["cache/rows_computed"] > 0)


def test_a_run_over_a_stream_measures_the_cache_that_it_fills(student_dir, teacher_dir, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text((ROWS / "messages.jsonl").read_text())
    stream = (
        "data=infinity_instruct", f"data.path={tmp_path / 'rows'}", "data.name=null",
        "data.schema=messages", "data.max_rows=null", "data.num_workers=0",
    )  # fmt: skip
    record = fit(student_dir, teacher_dir, tmp_path / "run", *stream, *STEPS, *auto(tmp_path / "c"))
    assert record.metrics["cache/rows_computed"] == NUM_ROWS
    assert record.metrics["cache/gradient_error"] < 1e-4
    (certificate,) = (tmp_path / "c").rglob("certificate.json")
    assert json.loads(certificate.read_text())["rows"] == NUM_ROWS


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in BRANCHES if name not in QUANTIZED])
def test_every_variant_trains_the_same_adapter_from_a_cache(
    variant, student_dir, teacher_dir, tmp_path, signs_of_singular_vectors
):
    # at 1e-2 two online runs that differ in the size of their chunks are further apart than this
    # where starts are computed (eva: 1e-4)
    _, (online, first, read) = online_and_cached(
        student_dir, teacher_dir, tmp_path, f"lora={variant}", "lora.r=4", "optim.lr=1e-3"
    )
    assert norm_of_difference(first, online) < 1e-5
    assert norm_of_difference(read, online) < 1e-5


@pytest.fixture
def signs_of_singular_vectors(monkeypatch):
    """Fixes those of LoRA-GA's directions, on which the last digit of a gradient decides."""
    svd = torch.svd_lowrank

    def signed(*arguments, **keywords):
        u, s, v = svd(*arguments, **keywords)
        largest = u.abs().argmax(0, keepdim=True)
        signs = u.gather(0, largest).sign()
        return u * signs, s, v * signs

    monkeypatch.setattr(torch, "svd_lowrank", signed)


@pytest.mark.slow
def test_a_cache_is_read_whatever_the_packing_batch_order_and_readers(
    student_dir, teacher_dir, tmp_path
):
    fit(
        student_dir,
        teacher_dir,
        tmp_path / "a",
        *STEPS,
        *auto(tmp_path / "c"),
        "data.val_share=0.2",
    )
    other = ("data.packing=false", "data.batch_size=3", "seed=5", "data.num_workers=1")
    record = fit(
        student_dir,
        None,
        tmp_path / "b",
        *STEPS,
        *other,
        "data.val_share=0.2",
        *cached(tmp_path / "c"),
    )
    beside = fit(student_dir, teacher_dir, tmp_path / "d", *STEPS, *other, "data.val_share=0.2")
    assert record.metrics["cache/rows_computed"] == 0
    assert record.metrics["val/kd"] == pytest.approx(beside.metrics["val/kd"], rel=1e-5)
    assert record.metrics["val/teacher_target"] == pytest.approx(
        beside.metrics["val/teacher_target"], rel=1e-5
    )
    assert record.metrics["val/agreement"] == beside.metrics["val/agreement"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["auto", "cached"])
def test_a_run_that_is_cut_off_goes_on_to_the_bit(how, student_dir, teacher_dir, tmp_path):
    short = ("trainer.max_epochs=-1", "trainer.max_steps=6", "checkpoint_every_n_steps=1",
             "data.batch_size=4", "data.packing=false")  # fmt: skip
    fit(student_dir, teacher_dir, tmp_path / "fill", *short, *auto(tmp_path / "c"))
    source = cached(tmp_path / "c") if how == "cached" else auto(tmp_path / "another")
    teacher = None if how == "cached" else teacher_dir
    whole = fit(student_dir, teacher, tmp_path / "whole", *short, *source)
    with power_cut(3):
        fit(student_dir, teacher, tmp_path / "cut", *short, *source)
    again = fit(student_dir, teacher, tmp_path / "cut", *short, *source)
    assert whole.status == again.status == "ok"
    assert_same_weights(trained(tmp_path / "cut"), trained(tmp_path / "whole"), atol=0.0)


def refused(student, teacher, folder, *overrides):
    with pytest.raises(ConfigError) as error:
        train(compose_raw(*settings(student, teacher, folder / "refused", *overrides)))
    return str(error.value)


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>: {% endif %}"
)


@pytest.fixture(scope="module")
def filled(student_dir, teacher_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled")
    fit(student_dir, teacher_dir, folder / "run", *STEPS, *auto(folder / "c"))
    return folder / "c"


def test_a_cache_made_for_other_runs_is_refused_with_what_differs(
    filled, student_dir, teacher_dir, tmp_path
):
    source = cached(filled)
    rows = (ROWS / "messages.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    (tmp_path / "t.jinja").write_text(_template(student_dir))
    another = tiny_model(tmp_path / "another", hidden=32, seed=9)
    for overrides, said in {
        ("data.max_length=96",): "rules.max_length: the cache has 128, the run has 96",
        (f"data.path={tmp_path / 'rows.jsonl'}",): "data.hash: the cache has",
        (f"data.chat_template={tmp_path / 't.jinja'}",): "chat_template: the cache has",
        (f"student.path={another}",): "student_head.sha256: the cache has",
        (f"teacher.of={another}",): "teacher.hash: the cache has",
        ("loss.temperature=2",): "loss.temperature=2.0: kind=projected was written at",
        ("loss=reverse_kl",): "loss.divergence=reverse_kl: kind=projected keeps",
        ("lora.modules_to_save=[lm_head]",): "head is trained or adapted",
        ("lora.target_modules=[q_proj,lm_head]",): "head is trained or adapted",
        ("method=kd",): "head is trained or adapted",
        ("loss.kd_positions=release",): "loss.kd_positions=release: takes tokens",
        ("trainer.strategy=ddp", "sharding=teacher"): "a cached teacher has nothing to split",
    }.items():
        assert said in refused(student_dir, None, tmp_path, *overrides, *source), overrides


def _template(student_dir):
    from lab import tokenizer

    return tokenizer().chat_template + " "


def test_a_folder_that_is_no_cache_and_a_damaged_one_are_refused(filled, student_dir, tmp_path):
    import shutil

    said = refused(student_dir, None, tmp_path, "teacher=cached", "teacher.path=nowhere")
    assert "nowhere: there is no such folder" in said
    (one,) = filled.iterdir()
    copy = tmp_path / "copy"
    shutil.copytree(one, copy)
    (copy / "growing.json").unlink()
    said = refused(student_dir, None, tmp_path, "teacher=cached", f"teacher.path={copy}")
    assert "there are shards" in said


@pytest.mark.slow
def test_rows_that_a_cache_lacks_are_named_before_the_run(student_dir, teacher_dir, tmp_path):
    few = (*STEPS, *auto(tmp_path / "c"), "data.max_rows=4")
    num = fit(student_dir, teacher_dir, tmp_path / "a", *few).rows["used"]
    said = refused(student_dir, None, tmp_path, *cached(tmp_path / "c"))
    assert f"lacks {NUM_ROWS - num} rows of this run, such as row" in said
    record = fit(student_dir, teacher_dir, tmp_path / "b", *STEPS, *auto(tmp_path / "c"))
    assert record.metrics["cache/rows_computed"] == NUM_ROWS - num


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hidden", "top_k", "top_p", "sampled"])
def test_every_kind_is_filled_read_and_certified(kind, student_dir, teacher_dir, tmp_path):
    loss = ("loss=jsd",) if kind in ("hidden", "top_k") else ()
    for name in ("first", "second"):
        record = fit(
            student_dir, teacher_dir, tmp_path / name,
            *("trainer.max_steps=3", "data.batch_size=4"), *loss,
            *auto(tmp_path / "c", f"teacher.kind={kind}"),
        )  # fmt: skip
        assert record.status == "ok"
        assert record.metrics["cache/bytes_per_token"] > 0
        assert record.metrics["cache/gradient_error"] < (1e-4 if kind == "hidden" else 1)
    assert record.metrics["cache/rows_computed"] == 0


@pytest.mark.slow
def test_two_runs_at_once_share_the_work_and_spoil_nothing(student_dir, teacher_dir, tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "neo.train",
             *settings(student_dir, teacher_dir, tmp_path / f"{seed}", *STEPS, f"seed={seed}",
                       *auto(tmp_path / "c"))],
            env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for seed in (0, 1)
    ]  # fmt: skip
    for run in runs:
        _, said = run.communicate(timeout=300)
        assert run.returncode == 0, said[-3000:]
    records = [json.loads((tmp_path / f"{s}" / "record.json").read_text()) for s in (0, 1)]
    assert sum(r["metrics"]["cache/rows_computed"] for r in records) == NUM_ROWS
    for seed, record in enumerate(records):
        fit(student_dir, teacher_dir, tmp_path / f"alone{seed}", *STEPS, f"seed={seed}")
        off = norm_of_difference(trained(tmp_path / f"{seed}"), trained(tmp_path / f"alone{seed}"))
        assert off < 1e-5, record["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["trainer.strategy=ddp", "trainer.strategy=fsdp", "sharding=teacher"]
)
@pytest.mark.parametrize("kind", ["projected", "hidden"])
def test_two_processes_fill_and_read_one_cache(way, kind, student_dir, teacher_dir, tmp_path):
    ways = ("trainer.strategy=ddp", way) if way.startswith("sharding") else (way,)
    fit(student_dir, teacher_dir, tmp_path / "alone", *IN_ORDER, "data.batch_size=4")
    two = ("trainer.devices=2", "data.batch_size=2", *IN_ORDER, *ways, "data.val_share=0")
    keep = auto(tmp_path / "c", f"teacher.kind={kind}")
    jobs = [settings(student_dir, teacher_dir, tmp_path / name, *two, *keep) for name in ("a", "b")]
    train_in_processes(jobs, tmp_path / "jobs")
    expected = trained(tmp_path / "alone")
    computed = []
    for name in ("a", "b"):
        assert norm_of_difference(trained(tmp_path / name), expected) < 1e-4
        record = json.loads((tmp_path / name / "record.json").read_text())
        computed.append(record["metrics"]["cache/rows_computed"])
        assert record["metrics"]["cache/gradient_error"] < 1e-4
    assert computed == [NUM_ROWS, 0]
