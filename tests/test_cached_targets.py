"""What a run reads of its cache is what the teacher beside it would give."""

from functools import cache

import pytest
import torch
from found_divergences import all_divergences
from lab import ROWS, tiny_model, tokenizer
from test_variant_laws import (
    BRANCHES,
    CPU,
    QUANTIZED,
    attached,
    each,
)

from neo.data.datamodule import DataModule
from neo.data.peek import peek
from neo.data.prompt import IGNORE
from neo.data.stream import FileData
from neo.losses.distillation import Distillation
from neo.models.head import head_of
from neo.models.student import inner, trained_parameters
from neo.teachers.durable import CacheError
from neo.teachers.fields import Shapes
from neo.teachers.online import OnlineTeacher
from neo.teachers.store import CacheFolder
from neo.teachers.stored import Stored
from neo.training.cached_targets import CachedTargets
from neo.training.run_cache import RunCache
from neo.training.token_loss import batch_sums

VOCAB = len(tokenizer())


@cache
def batches(path, size=4):
    data = DataModule(
        FileData(path=path, batch_size=size, max_length=64, val_share=0.0), tokenizer(), seed=0
    )
    return tuple(peek(data, 9))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    import json

    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.fixture
def base(name, student_dir, tmp_path):
    """In 4 bits, one of whole blocks of 64."""
    if name not in QUANTIZED:
        return student_dir
    return tiny_model(tmp_path / "base", hidden=64, seed=1)


@pytest.fixture(scope="module")
def teacher(teacher_dir):
    return OnlineTeacher(path=str(teacher_dir)).load_frozen(CPU).model


def cache_at(path, stored, student, teacher, *, grows=True):
    """A run's cache, without a run."""
    head, of_teacher = head_of(inner(student)), head_of(teacher)
    shapes = Shapes(
        vocab=VOCAB,
        d_student=head.weight.shape[1] if stored.kind == "projected" else None,
        d_teacher=of_teacher.weight.shape[1],
        teacher_rows=len(of_teacher.weight),
    )
    run = RunCache(
        path=path, folder=CacheFolder.open(path) if path.exists() else None,
        stored=stored.resolved("float32"), shapes=shapes, identity={"teacher": {"path": "a"}},
        grows=grows, num_lacking=None, source=None,
    )  # fmt: skip
    found = CachedTargets(run, pad_id=0)
    if stored.kind == "hidden":
        from neo.training.token_loss import factors_of

        found._teacher_head = factors_of(of_teacher)
    return found


def loss_and_gradient(student, given, batch, spec):
    student.zero_grad()
    sums = batch_sums(inner(student), given, batch, spec, VOCAB)
    sums.loss.backward()
    weights = [p for p in trained_parameters(student).values() if p.grad is not None]
    return sums, torch.cat([p.grad.flatten().double() for p in weights])


def assert_equal(student, teacher, cached, batch, spec, tolerance=1e-6):
    expected, gradient = loss_and_gradient(student, teacher, batch, spec)
    for model in (teacher, None):  # as it is stored, and as it is read back
        given = cached.given(batch, model, inner(student))
        sums, its = loss_and_gradient(student, given, batch, spec)
        assert sums.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
        assert (its - gradient).norm() / gradient.norm() < tolerance
        assert sums.agree == expected.agree or spec.kd_ratio == 0
    assert cached.num_computed == batch.num_rows


@pytest.mark.parametrize("name", each(BRANCHES))
def test_projected_gives_every_variant_the_loss_and_the_gradient_of_the_teacher_itself(
    name,
    base,
    teacher,
    rows,
    tmp_path,
):
    student = attached(name, base)
    (batch, *_) = batches(rows, 8)
    for temperature in (1.0, 2.0):
        stored = Stored(kind="projected", temperature=temperature)
        place = tmp_path / f"{temperature}"
        for kd_ratio in (0.0, 0.3, 1.0):
            cached = cache_at(place, stored, student, teacher)
            cached.num_computed = batch.num_rows if cached.folder is not None else 0
            spec = Distillation(kd_ratio=kd_ratio, temperature=temperature)
            assert_equal(student, teacher, cached, batch, spec)
            cached.close()


@pytest.mark.parametrize("divergence", all_divergences().values(), ids=all_divergences())
@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("hidden", 1.0),
        ("top_k", 2.0),
        pytest.param("hidden", 2.0, marks=pytest.mark.slow),
        pytest.param("top_k", 1.0, marks=pytest.mark.slow),
    ],
)
def test_all_ids_or_hidden_states_give_every_divergence(
    kind, temperature, divergence, student_dir, teacher, rows, tmp_path
):
    stored = (
        Stored(kind="hidden")
        if kind == "hidden"
        else Stored(kind="top_k", k=VOCAB, values="float32", temperature=temperature)
    )
    student = attached("lora", student_dir)
    cached = cache_at(tmp_path / "cache", stored, student, teacher)
    spec = Distillation(divergence=divergence, kd_ratio=0.3, temperature=temperature)
    (batch, *_) = batches(rows, 8)
    assert_equal(student, teacher, cached, batch, spec)


def test_rows_are_found_however_they_are_laid_out(student_dir, teacher, rows, tmp_path):
    student = attached("lora", student_dir)
    cached = cache_at(tmp_path / "cache", Stored(kind="projected"), student, teacher)
    for batch in batches(rows, 2):
        cached.given(batch, teacher, inner(student))
    assert cached.num_computed == len(ROWS)
    again = cache_at(tmp_path / "cache", Stored(kind="projected"), student, teacher)
    alone = DataModule(
        FileData(path=rows, batch_size=3, max_length=128, val_share=0.0, packing=False),
        tokenizer(),
        seed=5,
    )
    for batch in peek(alone, 9):
        given = again.given(batch, None, inner(student))
        spec = Distillation(kd_ratio=1.0)
        sums, _ = loss_and_gradient(student, given, batch, spec)
        expected, _ = loss_and_gradient(student, teacher, batch, spec)
        assert sums.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert again.num_computed == 0


def test_only_rows_that_are_lacking_are_run_over(student_dir, teacher, rows, tmp_path):
    student, asked = attached("lora", student_dir), []
    teacher.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    cached = cache_at(tmp_path / "cache", Stored(kind="projected"), student, teacher)
    first, second = batches(rows, 2)[:2]
    cached.given(first, teacher, inner(student))
    (whole, *_) = batches(rows, 8)
    asked.clear()
    given = cached.given(whole, teacher, inner(student))
    assert [shape[0] for shape in asked] == [len(ROWS) - first.num_rows]
    assert cached.num_computed == len(ROWS)
    spec = Distillation(kd_ratio=1.0)
    sums, its = loss_and_gradient(student, given, whole, spec)
    expected, gradient = loss_and_gradient(student, teacher, whole, spec)
    assert sums.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert (its - gradient).norm() / gradient.norm() < 1e-5
    with pytest.raises(CacheError, match="lacks"):
        cache_at(tmp_path / "other", Stored(kind="projected"), student, teacher).given(
            second, None, inner(student)
        )


def test_a_row_of_another_content_is_refused(student_dir, teacher, rows, tmp_path):
    student = attached("lora", student_dir)
    cached = cache_at(tmp_path / "cache", Stored(kind="projected"), student, teacher)
    (batch, *_) = batches(rows, 8)
    cached.given(batch, teacher, inner(student))
    ids = batch.input_ids.clone()
    ids[0, 0] += 1
    from dataclasses import replace

    with pytest.raises(CacheError, match=r"rows \d+ is another one than this run's"):
        cached.look_up(replace(batch, input_ids=ids), 0)
    with pytest.raises(CacheError, match="lacks"):  # of the other part
        cached.given(batch, None, inner(student), part=1)


def test_a_batch_is_looked_up_ahead_in_a_thread_and_moves_with_its_tensors(
    student_dir, teacher, rows, tmp_path
):
    student = attached("lora", student_dir)
    cached = cache_at(tmp_path / "cache", Stored(kind="projected"), student, teacher)
    for batch in batches(rows, 2):
        cached.given(batch, teacher, inner(student))
    prepare = cached.prepare(0)
    found = list(prepare.ahead(iter(batches(rows, 2))))
    assert prepare.num_batches == len(batches(rows, 2))
    for batch in found:
        moved = batch.to("meta")
        num = int((batch.targets != IGNORE).sum())
        assert moved.taught.tensors["mean_row"].shape[0] == num
        assert moved.taught.tensors["mean_row"].is_meta


def test_every_kind_of_error_of_the_thread_reaches_the_run(student_dir, teacher, rows, tmp_path):
    student = attached("lora", student_dir)
    cached = cache_at(tmp_path / "cache", Stored(kind="projected"), student, teacher)
    (batch, *_) = batches(rows, 8)
    cached.given(batch, teacher, inner(student))
    (file,) = (tmp_path / "cache").glob("*.bin")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    again = cache_at(tmp_path / "cache", Stored(kind="projected"), student, teacher)
    with pytest.raises(CacheError, match="is damaged at row"):
        list(again.prepare(0).ahead(iter([batch])))
