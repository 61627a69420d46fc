"""The most likely ids of a teacher, as lists with what the others have together."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Ids that are looked at first where it is not known how many are needed; then eight times as many.
_FIRST = 64


class Lists(NamedTuple):
    """Lists of ids, a row each, of which the first `counts` count.

    Args:
        ids: Of the tokens' lists.
        log_p: Log of their probabilities or weights.
        counts: Their lengths.
        log_rest: Log of the probability of all other ids together; None of a sample.
    """

    ids: Int64[Tensor, "chunk k"]
    log_p: Float[Tensor, "chunk k"]
    counts: Int64[Tensor, " chunk"]
    log_rest: Float[Tensor, " chunk"] | None


def most_likely(
    log_p: Float[Tensor, "chunk vocab"], p: Float[Tensor, "chunk vocab"], k: int
) -> Lists:
    """The k most likely ids, most likely first.

    Args:
        log_p: Log of p.
        p: Destroyed.
        k: At most the number of ids.
    """
    top, ids = log_p.topk(k, dim=-1)
    counts = torch.full((len(p),), k, device=p.device)
    # What is left is added up: one minus what is listed would have no digits of a small rest.
    return Lists(ids, top, counts, p.scatter_(-1, ids, 0.0).sum(-1).log())


def nucleus(
    log_p: Float[Tensor, "chunk vocab"],
    p: Float[Tensor, "chunk vocab"],
    mass: float,
    longest: int | None = None,
) -> Lists:
    """The fewest ids whose probabilities add up to `mass` at least, most likely first.

    Holtzman et al. 2020, arXiv:1904.09751.

    Args:
        log_p: Log of p.
        p: Destroyed.
        mass: In (0, 1]; at 1 all ids that have a probability.
        longest: At most so many ids, whatever their mass; None for no bound.
    """
    longest = min(longest or p.shape[-1], p.shape[-1])
    k = min(_FIRST, longest)
    while True:
        top, ids = p.topk(k, dim=-1)
        before = top.double().cumsum(-1) - top
        needed = (before < mass) & (top > 0)
        if k == longest or not needed[:, -1].any():
            break
        k = min(8 * k, longest)
    needed[:, 0] = True
    counts = needed.sum(-1)
    # Of ids behind the list nothing is taken away.
    listed = torch.where(needed, ids, ids[:, :1])
    rest = p.scatter_(-1, listed, 0.0).sum(-1).log()
    return Lists(ids, log_p.gather(-1, ids), counts, rest)
