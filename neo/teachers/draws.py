"""Ids drawn from a teacher, with weights that stand for its probabilities on average."""

from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from neo.teachers.lists import Lists
from neo.teachers.shards import RowKey, key_number
from neo.teachers.stored import Stored


class Purpose(IntEnum):
    """What random numbers are for; each has its own."""

    DRAW = 0
    ROUND = 1


def generator(stored: Stored, key: RowKey, purpose: Purpose) -> np.random.Generator:
    """The random numbers of a row, which depend on nothing but seed, row and purpose.

    Philox (Salmon et al. 2011) has a sequence of its own for every key.
    """
    words = np.array([stored.seed, key_number(key)], dtype=np.uint64)
    counter = np.array([0, 0, 0, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=counter))


def sampled_lists(
    log_p: Float[Tensor, "chunk vocab"],
    p: Float[Tensor, "chunk vocab"],
    k: int,
    proposal: float,
    uniform: Float64[Tensor, "chunk samples"],
) -> Lists:
    r"""The k most likely ids as they are, and a sample of the others, each id once.

    An id is drawn with probability $q_i \propto p_i^t$, among those that are not kept as they are;
    drawn $c$ times of $n$ it has the weight $c\,p_i / (n\,q_i)$, which is $p_i$ on average
    (Anshumann et al. 2025, arXiv:2503.16870).

    Args:
        log_p: Log of p.
        p: Destroyed.
        k: Ids kept as they are; 0 for none.
        proposal: t.
        uniform: In [0, 1), one for each draw.
    """
    samples = uniform.shape[1]
    if k:
        top, top_ids = log_p.topk(min(k, p.shape[-1]), dim=-1)
        p.scatter_(-1, top_ids, 0.0)
    # Proportional to q; where t is 1 to the very numbers that are the weights.
    density = p if proposal == 1 else p.pow_(proposal)
    cumulated = density.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:].contiguous()
    draws = torch.searchsorted(cumulated, uniform * total, right=True)
    draws = draws.clamp_max_(p.shape[-1] - 1).sort(-1).values
    # Equal draws stand side by side now: each run of them becomes one entry.
    begins = torch.ones_like(draws, dtype=torch.bool)
    begins[:, 1:] = draws[:, 1:] != draws[:, :-1]
    entry = begins.cumsum(-1) - 1
    times_drawn = torch.zeros_like(draws).scatter_add_(-1, entry, torch.ones_like(draws))
    ids = torch.zeros_like(draws).scatter_(-1, entry, draws)
    log_weight = (
        log_p.gather(-1, ids).double() * (1 - proposal)
        + total.log()
        + (times_drawn / samples).log()
    )
    counts = begins.sum(-1)
    # Nothing is drawn where nothing is left.
    counts = counts.masked_fill(total.squeeze(-1) == 0, 0)
    if k:
        ids = torch.cat([top_ids, ids], -1)
        log_weight = torch.cat([top.double(), log_weight], -1)
        counts = counts + top_ids.shape[1]
    return Lists(ids, log_weight.to(log_p.dtype), counts, None)
