import numpy as np
import pytest
import torch
from small_cache import EACH, KEYS, NAMES, NUM_TOKENS, SHAPES, VOCAB, blobs, models, stored

from neo.losses.given import HiddenStates, Listed, Projected
from neo.teachers.durable import CacheError
from neo.teachers.shards import StoredRow
from neo.teachers.unpack import given_of, unpacked


def rows(kept, **more):
    made = zip(KEYS, blobs(kept, **more), strict=True)
    return [StoredRow(num, 0, memoryview(blob)) for (_, num), blob in made]


def given(kept, **more):
    return given_of(unpacked(rows(kept, **more), kept, SHAPES), kept, head=models()[0].head)


def exact(temperature):
    """The teacher's probabilities in float64."""
    teacher = models()[0]
    head = teacher.head
    logits = (teacher.hidden.double() @ head.weight.double().T + head.bias.double()) * 0.7
    return (logits[:, :VOCAB] / temperature).softmax(-1)


@pytest.mark.parametrize("kept", EACH, ids=NAMES)
def test_rows_read_one_by_one_or_together_are_the_same_tokens(kept):
    together = unpacked(rows(kept), kept, SHAPES)
    apart = [unpacked([row], kept, SHAPES) for row in rows(kept)]
    for name, column in together.items():
        parts = [each[name] for each in apart]
        if column.ndim == 2:  # lists are as wide as the longest
            fill = -torch.inf if name == "log_p" else 0
            parts = [
                torch.nn.functional.pad(part, (0, column.shape[1] - part.shape[1]), value=fill)
                for part in parts
            ]
        torch.testing.assert_close(torch.cat(parts), column, rtol=0, atol=0)


def test_float32_is_exact_to_the_bit_and_smaller_dtypes_stay_as_they_are():
    teacher = models()[0]
    for values in ("float32", "bfloat16", "float16"):
        kept = stored("hidden", values)
        found = given(kept)
        assert isinstance(found, HiddenStates)
        assert found.head is teacher.head
        dtype = getattr(torch, values)
        torch.testing.assert_close(found.hidden, teacher.hidden.to(dtype), rtol=0, atol=0)
    whole = unpacked(rows(stored("projected")), stored("projected"), SHAPES)["mean_row"]
    kept = stored("projected", "bfloat16")
    half = unpacked(rows(kept), kept, SHAPES)["mean_row"]
    torch.testing.assert_close(half, whole.to(torch.bfloat16), rtol=0, atol=0)
    kept = stored("projected", "int8")
    tensors = unpacked(rows(kept), kept, SHAPES)
    assert tensors["mean_row"].dtype == torch.int8
    step = tensors["scale"][:, None]
    found = given_of(tensors, kept)
    assert isinstance(found, Projected)
    assert found.mean_row.dtype == torch.float32
    assert ((found.mean_row - whole).abs() <= step * 1.0001).all()


def test_what_is_kept_in_16_bits_is_within_their_step_of_float32():
    for kind in ("top_k", "top_p"):
        exactly, nearly = (
            unpacked(rows(stored(kind, values)), stored(kind, values), SHAPES)
            for values in ("float32", "fixed16")
        )
        assert set(exactly) == set(nearly) >= {"target", "top", "mass_out", "ids", "log_p", "rest"}
        for name, column in exactly.items():
            some = column.isfinite()
            assert (nearly[name].isfinite() == some).all()
            step = {"mass_out": 2**-11, "top": 0, "ids": 0}.get(name, 2**-12)
            assert (nearly[name][some] - column[some]).abs().max() <= step
        given_nearly = given(stored(kind, "fixed16"))
        assert isinstance(given_nearly, Listed)
        assert given_nearly.log_rest is not None
        some = exactly["log_p"].isfinite()
        assert (given_nearly.log_p[some] - exactly["log_p"][some]).abs().max() <= 2**-11
        mass = given_nearly.log_p.exp().sum(-1) + given_nearly.log_rest.exp()
        torch.testing.assert_close(mass, torch.ones(NUM_TOKENS), rtol=0, atol=1e-6)


def test_facts_are_the_teachers():
    targets = models()[1]
    p = exact(1.0)
    for kept in EACH:
        found = given(kept)
        if kept.kind == "hidden":
            continue
        assert found.temperature == 2.0
        tolerance = 1e-6 if kept.values == "float32" else 2**-11
        wanted = p[range(NUM_TOKENS), targets].float()
        torch.testing.assert_close(found.facts.target, wanted, rtol=tolerance, atol=1e-7)
        torch.testing.assert_close(found.facts.top, p.argmax(-1))
        assert found.facts.mass_out is not None
        assert found.facts.mass_out.dtype == torch.float32


def test_all_ids_with_their_probabilities_are_the_whole_distribution():
    kept = stored("top_k", "float32", k=VOCAB)
    found = given(kept)
    p = torch.zeros(NUM_TOKENS, VOCAB).scatter_(-1, found.ids, found.log_p.exp())
    torch.testing.assert_close(p, exact(2.0).float(), rtol=2e-6, atol=1e-7)
    assert found.log_rest.isneginf().all()
    assert found.entropy is None


def test_what_is_missing_is_one_id_more_or_made_to_vanish():
    other, renormalised = (given(stored("top_k", missing=m)) for m in ("other", "renormalise"))
    top = exact(2.0).topk(7).values
    torch.testing.assert_close(
        other.log_rest.exp().double(), 1 - top.sum(-1), rtol=2**-11, atol=1e-6
    )
    assert renormalised.log_rest.isneginf().all()
    torch.testing.assert_close(
        renormalised.log_p.exp().double(), top / top.sum(-1, keepdim=True), rtol=2**-10, atol=1e-6
    )


def test_a_sample_has_each_id_once_and_says_nothing_of_the_others():
    for more in ({}, {"k": 4}, {"k": 4, "proposal": 0.8}, {"samples": 500}):
        kept = stored("sampled", "float32", **more)
        found = given(kept)
        assert found.log_rest is None
        for ids, log_p in zip(found.ids, found.log_p, strict=True):
            used = ids[log_p.isfinite()]
            assert len(used.unique()) == len(used) <= (kept.k or 0) + kept.samples
            assert (log_p[len(used) :].isneginf()).all()
        p = exact(2.0)
        torch.testing.assert_close(
            found.entropy.double(), -(p * p.log()).sum(-1), rtol=1e-6, atol=1e-6
        )
        top, ids = p.topk(kept.k or 1)
        if kept.k:
            torch.testing.assert_close(found.ids[:, :4], ids)
            torch.testing.assert_close(found.log_p[:, :4].exp().double(), top, rtol=2e-6, atol=1e-7)
        if kept.proposal == 1:  # weights of draws from the teacher add up to 1 whatever was drawn
            mass = found.log_p.exp().sum(-1)
            torch.testing.assert_close(mass, torch.ones(NUM_TOKENS), rtol=0, atol=2e-6)


def test_a_blob_of_other_tokens_is_refused():
    kept = stored("top_p")
    row = rows(kept)[0]
    for broken in (row._replace(num_tokens=9), row._replace(blob=row.blob[:-8])):
        with pytest.raises(CacheError, match=r"cannot be read: a blob of \d+ bytes"):
            unpacked([broken], kept, SHAPES)


def test_hidden_states_need_a_head():
    kept = stored("hidden")
    with pytest.raises(ValueError, match="head=None: hidden states need"):
        given_of(unpacked(rows(kept), kept, SHAPES), kept)


def test_ids_take_the_bits_that_hold_the_vocabulary():
    sizes = {each: len(blobs(stored("top_k", "float32", k=each))[2]) for each in (8, 16)}
    num_tokens = KEYS[2][1]
    assert num_tokens * 8 * (6 + 32) / 8 == pytest.approx(sizes[16] - sizes[8], abs=16)


@pytest.mark.parametrize("values", ["bfloat16", "float32"])
def test_what_is_read_is_the_readers_own(values):
    kept = stored("hidden", values)
    content = bytearray(b"".join(blobs(kept)[:1]))
    tensors = unpacked([StoredRow(3, 0, memoryview(content))], kept, SHAPES)
    before = tensors["hidden"].clone()
    content[:] = np.full(len(content), 255, dtype=np.uint8).tobytes()
    torch.testing.assert_close(tensors["hidden"], before)
