"""What is drawn or rounded at random is the teacher on average; what is cut off is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_cache import D_STUDENT, VOCAB, models, stored

from neo.losses.given import HiddenStates, Listed, Projected
from neo.losses.head import Head
from neo.teachers.fields import Shapes
from neo.teachers.measure import measured
from neo.teachers.shards import RowKey, StoredRow
from neo.teachers.unpack import given_of, unpacked

# Draws are numbers of seeds times copies of each token, which are drawn for by themselves.
TOKENS, SEEDS, COPIES = 5, 64, 64
COUNTS = [4, 16, 64, 256, 1024, SEEDS * COPIES]
# One number of rows for both: a head of the student that is the teacher's width is not needed.
SHAPES = Shapes(vocab=VOCAB, d_student=D_STUDENT, d_teacher=VOCAB, teacher_rows=VOCAB)


def teacher_logits():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, VOCAB, generator=generator).mul_(2)


def student():
    """Its head, and its hidden states of the tokens."""
    head = models()[2]
    hidden = torch.randn(TOKENS, D_STUDENT, generator=torch.Generator().manual_seed(2))
    return Head(weight=head.weight), hidden


def draws(kept):
    """What is given for every token under many seeds: (draws, tokens, ...)."""
    hidden = teacher_logits().repeat(COPIES, 1)
    given = HiddenStates(hidden=hidden, head=Head(weight=torch.eye(VOCAB)))
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    rows = [(RowKey(0, 3), len(hidden))]
    for seed in range(SEEDS):
        one = replace(kept, seed=seed) if kept.is_random else kept
        (blob,) = measured(given, targets, one, SHAPES, rows, student()[0])
        row = StoredRow(len(hidden), 0, memoryview(blob))
        yield given_of(unpacked([row], one, SHAPES), one)
        if not kept.is_random:
            return


def scattered(given, q):
    """The probabilities that a list stands for, of which those not listed are the student's."""
    assert isinstance(given, Listed)
    p = torch.zeros(len(given.ids), VOCAB).scatter_add_(-1, given.ids, given.log_p.exp())
    if given.log_rest is None:
        return p.double()
    listed = torch.zeros_like(p).scatter_add_(-1, given.ids, given.log_p.isfinite().float()) > 0
    # To the gradient all other ids are one: what they have is shared out as the student does.
    others = q.masked_fill(listed, 0.0)
    share = others / others.sum(-1, keepdim=True).clamp_min(1e-30)
    return (p + given.log_rest.exp()[:, None] * share).double()


def errors(kept):
    """By how much the mean of so many draws misses the teacher, and its gradient the full one."""
    p = (teacher_logits().double() / 2).softmax(-1)
    head, hidden = student()
    weight = head.weight[:VOCAB].double()
    q = (hidden.double() @ weight.T / 2).softmax(-1)
    values, gradients = [], []
    for given in draws(kept):
        if isinstance(given, Projected):
            found = given.mean_row.double().view(-1, TOKENS, D_STUDENT)
            values.append(found)
            gradients.append(q @ weight - found)  # in the student's hidden states
        else:
            found = scattered(given, q.float().repeat(COPIES, 1)).view(-1, TOKENS, VOCAB)
            values.append(found)
            gradients.append(q - found)  # in the student's logits
    projected = kept.kind == "projected"
    right = (p @ weight, (q - p) @ weight) if projected else (p, q - p)
    found = []
    for drawn, wanted in zip((values, gradients), right, strict=True):
        everything = torch.cat(drawn)
        if not kept.is_random:
            everything = everything[:1].expand(SEEDS * COPIES, -1, -1)
        # of disjoint groups of so many draws, so that each number is a mean itself
        misses = []
        for count in COUNTS:
            means = everything.unflatten(0, (-1, count)).mean(1)
            misses.append((means - wanted).square().mean().sqrt().item())
        found.append(np.array(misses))
    return found


def slope(misses):
    return np.polyfit(np.log(COUNTS), np.log(misses), 1)[0]


UNBIASED = [
    stored("projected", "int8"),
    stored("sampled", "float32"),
    stored("sampled", "fixed16"),
    stored("sampled", "fixed16", proposal=0.6),
    stored("sampled", "fixed16", proposal=1.2, samples=30),
    stored("sampled", "fixed16", k=4),
    stored("sampled", "fixed16", k=4, proposal=0.6, samples=3),
    stored("sampled", "fixed16", k=VOCAB, samples=1),  # nothing is drawn, but weights are rounded
]
BIASED = [
    stored("top_k", "float32", missing="other"),
    stored("top_k", "float32", missing="renormalise"),
    stored("top_p", "fixed16", p=0.8, missing="other"),
    stored("top_p", "fixed16", p=0.8, missing="renormalise"),
    stored("top_k", "fixed16", k=VOCAB),
    stored("projected", "bfloat16"),
]


@pytest.mark.parametrize("kept", UNBIASED, ids=str)
def test_the_mean_of_n_draws_and_of_their_gradients_approaches_the_full_one_as_one_over_root_n(
    kept,
):
    for misses in errors(kept):
        assert slope(misses) == pytest.approx(-0.5, abs=0.07)
        assert misses[-1] < misses[0] / 15


@pytest.mark.parametrize("kept", BIASED, ids=str)
def test_what_is_cut_off_or_rounded_to_nearest_stays_off(kept):
    for misses in errors(kept):
        assert slope(misses) == pytest.approx(0, abs=1e-6)
        rounded_alone = kept.kind == "projected" or kept.k == VOCAB
        assert misses[-1] > (1e-6 if rounded_alone else 1e-3)
