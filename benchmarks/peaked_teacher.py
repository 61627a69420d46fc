"""Hidden states over a random head whose softmax is as peaked, token by token, as asked for.

How many ids a cache lists of a token hangs on the teacher's entropy there. A random teacher has one
entropy everywhere; a trained one is sure of most tokens and unsure of a few.
"""

import torch
from jaxtyping import Float
from quantization import CPU, MINI, validation
from torch import Tensor

from neo.data.prompt import IGNORE
from neo.losses.head import Head
from neo.teachers.online import OnlineTeacher
from neo.training.token_loss import given_by

# Of the factor of a token's logits, which are drawn from a normal distribution of variance 1.
FACTORS = (0.05, 1000.0)
STEPS = 18  # of bisection
BLOCK = 50  # tokens whose logits are worked on at a time


@torch.no_grad()
def mini_entropies() -> Float[Tensor, " tokens"]:
    """Of the mini-lab's teacher at the supervised tokens of its validation rows, in nats."""
    batches, vocab = validation()
    model = OnlineTeacher(path=MINI, dtype="float32").load_frozen(CPU).model
    found = []
    for batch in batches:
        given = given_by(model, batch, batch.targets != IGNORE)
        found.append(entropies(given.head.logits(given.hidden, stop=vocab)))
    return torch.cat(found)


def entropies(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """Of their softmax, in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def peaked_states(
    head: Head, wanted: Float[Tensor, " tokens"], generator: torch.Generator
) -> Float[Tensor, "tokens d"]:
    """Random directions, each as long as gives the softmax over the head the entropy wanted.

    Args:
        head: Rows of mean square length 1.
        wanted: Entropies below that of the uniform distribution.
        generator: Of the directions.
    """
    d = head.weight.shape[1]
    states = torch.randn(len(wanted), d, generator=generator)
    for start in range(0, len(wanted), BLOCK):
        block = slice(start, start + BLOCK)
        logits = head.logits(states[block])
        low, high = (torch.full((len(logits), 1), factor).log() for factor in FACTORS)
        for _ in range(STEPS):  # the larger the factor, the lower the entropy
            middle = (low + high) / 2
            too_flat = entropies(logits * middle.exp()) > wanted[block]
            low = torch.where(too_flat[:, None], middle, low)
            high = torch.where(too_flat[:, None], high, middle)
        states[block] *= ((low + high) / 2).exp()
    return states


@torch.no_grad()
def describe_states(head: Head, states: Float[Tensor, "tokens d"]) -> dict[str, float]:
    """Means over tokens: entropy in nats, and probability of the most likely id."""
    entropy, top = 0.0, 0.0
    for block in states.split(BLOCK):
        logits = head.logits(block)
        entropy += entropies(logits).sum().item()
        top += logits.softmax(-1).amax(-1).sum().item()
    return {"entropy_nats": entropy / len(states), "top_1_mass": top / len(states)}
