from dataclasses import replace

import pytest
import torch
from small_cache import (
    D_STUDENT,
    EACH,
    KEYS,
    NAMES,
    NUM_TOKENS,
    SHAPES,
    VOCAB,
    blobs,
    models,
    stored,
)

from neo.losses.given import HiddenStates
from neo.losses.head import Head
from neo.teachers.draws import Purpose, generator
from neo.teachers.fields import Shapes
from neo.teachers.measure import mean_rows, measured
from neo.teachers.shards import RowKey, StoredRow
from neo.teachers.unpack import unpacked


def columns(made, kept, shapes=SHAPES, keys=KEYS):
    rows = [StoredRow(num, 0, memoryview(blob)) for (_, num), blob in zip(keys, made, strict=True)]
    return unpacked(rows, kept, shapes)


def exact(temperature=1.0):
    """The teacher's probabilities, in float64 and by the definition."""
    given, targets, student = models()
    head = given.head
    logits = (given.hidden.double() @ head.weight.double().T + head.bias.double()) * 0.7
    over_all = logits.softmax(-1)
    p = (logits[:, :VOCAB] / temperature).softmax(-1)
    return p, over_all, targets, student


def close(found, wanted, **tolerance):
    torch.testing.assert_close(
        found.double(), wanted.double(), **{"rtol": 2e-6, "atol": 2e-6} | tolerance
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_a_projection_is_that_of_float64(temperature):
    kept = stored("projected", "float32", temperature=temperature)
    found = columns(blobs(kept), kept)
    p, over_all, targets, student = exact(temperature)
    close(found["mean_row"], p @ student.weight[:VOCAB].double())
    close(found["mean_bias"], p @ student.bias[:VOCAB].double())
    close(found["entropy"], -(p * p.log()).sum(-1))
    inside = over_all[:, :VOCAB]
    at_one = inside / inside.sum(-1, keepdim=True)
    close(found["target"], -at_one[range(NUM_TOKENS), targets].log())
    close(found["mass_out"], 1 - inside.sum(-1))
    torch.testing.assert_close(found["top"], at_one.argmax(-1))


@pytest.mark.parametrize("k", [1, 7, VOCAB])
def test_the_most_likely_ids_and_what_is_left_are_those_of_float64(k):
    kept = stored("top_k", "float32", k=k)
    found = columns(blobs(kept), kept)
    top, ids = exact(2.0)[0].topk(k)
    torch.testing.assert_close(found["ids"], ids)
    close(found["log_p"], top.log())
    rest = 1 - top.sum(-1) if k < VOCAB else torch.zeros(NUM_TOKENS)
    close(torch.exp(-found["rest"]), rest)
    assert (found["rest"].isinf() == (k == VOCAB)).all()


def test_a_small_rest_keeps_its_digits():
    head = Head(weight=torch.eye(4))
    hidden = torch.tensor([[20.0, 19.0, 0.0, -1.0]])
    kept = stored("top_k", "float32", k=2, temperature=1.0)
    shapes = Shapes(vocab=4, d_teacher=4, teacher_rows=4)
    rows = [(RowKey(0, 0), 1)]
    made = measured(HiddenStates(hidden=hidden, head=head), torch.tensor([0]), kept, shapes, rows)
    found = columns(made, kept, shapes, rows)
    close(-found["rest"], hidden.double().softmax(-1)[:, 2:].sum(-1).log(), rtol=1e-6)


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.95, 1.0])
def test_the_fewest_ids_whose_mass_reaches_p_are_kept_and_at_least_one(p):
    kept = stored("top_p", "float32", p=p)
    found = columns(blobs(kept), kept)
    probabilities = exact(2.0)[0]
    for token, (sizes, ids) in enumerate(zip(*probabilities.sort(descending=True), strict=True)):
        wanted = min(VOCAB, int((sizes.cumsum(0) < p - 1e-12).sum()) + 1)
        used = found["log_p"][token].isfinite()
        assert used.sum() == wanted
        torch.testing.assert_close(found["ids"][token][used], ids[:wanted])
        assert (found["ids"][token][~used] == 0).all()
        close(found["log_p"][token][used], sizes[:wanted].log())
        close(torch.exp(-found["rest"][token]), 1 - sizes[:wanted].sum())


def test_a_list_is_no_longer_than_it_may_be_and_the_rest_is_what_it_leaves():
    kept = stored("top_p", "float32", p=0.99, k=3)
    found = columns(blobs(kept), kept)
    sizes = exact(2.0)[0].sort(descending=True)[0]
    used = found["log_p"].isfinite().sum(-1)
    assert used.max() == 3
    close(torch.exp(-found["rest"][used == 3]), sizes[used == 3, 3:].sum(-1))


def test_more_ids_than_are_looked_at_first_are_found():
    vocab = 1000
    head = Head(weight=torch.eye(vocab))
    hidden = torch.linspace(0, 1, vocab)[None].expand(2, vocab).contiguous()
    shapes = Shapes(vocab=vocab, d_teacher=vocab, teacher_rows=vocab)
    kept = stored("top_p", "float32", p=0.5)
    rows = [(RowKey(0, 0), 2)]
    made = measured(
        HiddenStates(hidden=hidden, head=head), torch.tensor([0, 1]), kept, shapes, rows
    )
    found = columns(made, kept, shapes, rows)
    sizes = (hidden[0] / 2).double().softmax(-1).flip(0)
    assert found["ids"].shape == (2, int((sizes.cumsum(0) < 0.5).sum()) + 1)
    assert found["ids"].shape[1] > 64


def test_ids_that_are_ruled_out_have_no_probability_and_are_never_drawn():
    bias = torch.tensor([0.0, 1.0, -torch.inf, 0.5, -torch.inf, -torch.inf])
    shapes = Shapes(vocab=6, d_teacher=6, teacher_rows=6)
    head = Head(weight=torch.zeros(6, 6), bias=bias)
    given = HiddenStates(hidden=torch.zeros(1, 6), head=head)
    rows = [(RowKey(0, 0), 1)]
    for kept in (
        stored("sampled", samples=500, temperature=1.0),
        stored("sampled", samples=500, k=2, proposal=0.5, temperature=1.0),
        stored("sampled", samples=5, k=4, proposal=0.5, temperature=1.0),
        stored("top_p", p=1.0, temperature=1.0),
        stored("top_k", k=6, temperature=1.0),
    ):
        found = columns(measured(given, torch.tensor([2]), kept, shapes, rows), kept, shapes, rows)
        some = found["ids"][found["log_p"].isfinite()]
        assert sorted(some.tolist()) == [0, 1, 3]
        assert found["target"].isposinf().all()
        assert not any(column.isnan().any() for column in found.values())


@pytest.mark.parametrize("kept", [each for each in EACH if each.kind != "projected"], ids=str)
def test_neither_chunks_nor_calls_change_a_byte(kept):
    # The logits of these are hidden states to the bit, however many tokens are multiplied.
    given, targets, student = models()
    logits = torch.randn(NUM_TOKENS, 53, generator=torch.Generator().manual_seed(3))
    given = HiddenStates(hidden=logits, head=Head(weight=torch.eye(53)))
    shapes = replace(SHAPES, d_teacher=53)
    whole = measured(given, targets, kept, shapes, KEYS, student)
    for chunk_tokens in (1, 4, 5):
        again = measured(given, targets, kept, shapes, KEYS, student, chunk_tokens=chunk_tokens)
        assert again == whole
    starts = [0, 3, 4, 11, 13]
    for number in (2, 0, 3, 1):
        tokens = slice(starts[number], starts[number + 1])
        alone = HiddenStates(hidden=logits[tokens], head=given.head)
        assert measured(alone, targets[tokens], kept, shapes, [KEYS[number]], student) == [
            whole[number]
        ]


def test_chunks_change_no_projection_by_more_than_its_last_digit_nor_its_rounding():
    for values in ("float32", "int8"):
        kept = stored("projected", values)
        whole, again = (columns(blobs(kept, chunk_tokens=n), kept) for n in (100, 2))
        for name in whole:
            close(again[name], whole[name], rtol=1e-6, atol=1e-6)


def test_what_is_random_depends_on_seed_part_and_row_alone():
    given, targets, student = models()
    for kept in (stored("sampled"), stored("projected", "int8")):
        same = HiddenStates(hidden=given.hidden[:1].expand(NUM_TOKENS, -1), head=given.head)
        keys = [(RowKey(0, 5), 4), (RowKey(1, 5), 4), (RowKey(0, 6), 4), (RowKey(0, 7), 1)]
        made = measured(same, targets[:1].expand(NUM_TOKENS), kept, SHAPES, keys, student)
        assert len(set(made)) == len(keys)
        other = measured(
            same, targets[:1].expand(NUM_TOKENS), replace(kept, seed=1), SHAPES, keys, student
        )
        assert not set(made) & set(other)


@pytest.mark.parametrize("kept", EACH, ids=NAMES)
def test_rows_without_tokens_and_no_rows_at_all_are_nothing_special(kept):
    given, targets, student = models()
    none = HiddenStates(hidden=given.hidden[:0], head=given.head)
    assert measured(none, targets[:0], kept, SHAPES, [], student) == []
    keys = [(RowKey(0, 1), 0)]
    made = measured(none, targets[:0], kept, SHAPES, keys, student)
    assert made == [b""]
    assert all(len(column) == 0 for column in columns(made, kept, keys=keys).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_are_measured_in_float32_or_more(dtype):
    given, targets, student = models(dtype)
    kept = stored("projected", "float32", temperature=1.0)
    found = columns(measured(given, targets, kept, SHAPES, KEYS, student), kept)
    wide = [x.double() for x in (given.hidden, given.head.weight, given.head.bias)]
    p = ((wide[0] @ wide[1].T + wide[2])[:, :VOCAB] * 0.7).softmax(-1)
    close(found["mean_row"], p @ student.weight[:VOCAB].double())
    close(found["entropy"], -(p * p.log()).sum(-1))
    hidden = stored("hidden").resolved()  # values are left open
    again = columns(
        measured(given, targets, replace(hidden, values=None), SHAPES, KEYS),
        replace(hidden, values=None).resolved(str(dtype).removeprefix("torch.")),
    )["hidden"]
    assert again.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    torch.testing.assert_close(again, given.hidden.to(again.dtype), rtol=0, atol=0)


def test_the_mean_of_half_precision_rows_has_the_accuracy_of_float32():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(9, 3000, generator=generator).mul_(3).softmax(-1)
    weight = torch.randn(3000, D_STUDENT, generator=generator).to(torch.bfloat16)
    close(mean_rows(p, weight), p.double() @ weight.double(), rtol=1e-6, atol=3e-6)
    rounded = p.to(torch.bfloat16).double() @ weight.double()  # as a backward pass has it
    assert (rounded - p.double() @ weight.double()).abs().max() > 1e-4


def test_autocast_multiplies_the_teacher_as_the_loss_does():
    given, targets, student = models()
    kept = stored("projected", "float32", temperature=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = columns(measured(given, targets, kept, SHAPES, KEYS, student), kept)
    halves = HiddenStates(
        hidden=given.hidden.to(torch.bfloat16), head=given.head.to(torch.bfloat16)
    )
    wanted = columns(measured(halves, targets, kept, SHAPES, KEYS, student), kept)
    for name, column in wanted.items():
        close(found[name], column)


WRONG = [
    (dict(keys=KEYS[:-1]), "rows: have 11 tokens, and there are 13 hidden states"),
    (dict(student=None), "student_head=None: kind=projected is made with"),
    (dict(shapes=replace(SHAPES, d_teacher=9)), r"given.head.weight: is of shape \(53, 12\)"),
    (dict(shapes=replace(SHAPES, d_student=9)), r"student_head.weight: is of shape \(52, 8\)"),
    (dict(shapes=replace(SHAPES, d_student=None)), "d_student=None: kind=projected needs"),
    (dict(shapes=replace(SHAPES, student_bias=False)), "student_bias=False: the student's head"),
    (dict(student=Head(weight=torch.zeros(52, 8), softcap=3.0)), "must be linear and without"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_go_together_is_refused(change, message):
    given, targets, student = models()
    parts = {"keys": KEYS, "student": student, "shapes": SHAPES} | change
    kept = stored("projected", "float32")
    with pytest.raises(ValueError, match=message):
        measured(given, targets, kept, parts["shapes"], parts["keys"], parts["student"])


def test_more_ids_than_there_are_cannot_be_kept():
    with pytest.raises(ValueError, match="k=51: must be at most vocab=50"):
        blobs(stored("top_k", k=51))
    with pytest.raises(ValueError, match="k=64: must be at most vocab=50"):
        blobs(stored("sampled", k=64))


@pytest.mark.parametrize("kept", EACH, ids=NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_that_gives_no_numbers_is_not_kept(kept, value):
    given, targets, student = models()
    hidden = given.hidden.clone()
    hidden[8, 2] = value
    broken = replace(given, hidden=hidden)
    with pytest.raises(ValueError, match=r"row 2 of rows: .* for its supervised token 4, and"):
        measured(broken, targets, kept, SHAPES, KEYS, student)


def test_hidden_states_too_large_for_their_dtype_are_not_kept():
    given, targets, _ = models()
    large = replace(given, hidden=given.hidden * 1e6)
    measured(large, targets, stored("hidden", "bfloat16"), SHAPES, KEYS)
    with pytest.raises(ValueError, match=r"row 5 of rows: .* token 0, .* hidden in float16"):
        measured(large, targets, stored("hidden", "float16"), SHAPES, KEYS)


def test_draws_and_rounding_do_not_share_their_random_numbers():
    kept, key = stored("sampled"), RowKey(0, 5)
    others = [
        generator(kept, key, Purpose.ROUND),
        generator(kept, RowKey(1, 5), Purpose.DRAW),
        generator(kept, RowKey(0, 6), Purpose.DRAW),
        generator(replace(kept, seed=1), key, Purpose.DRAW),
    ]
    first = generator(kept, key, Purpose.DRAW).random(1000)
    for other in others:
        assert not set(first) & set(other.random(1000))
    assert (first == generator(kept, key, Purpose.DRAW).random(1000)).all()
