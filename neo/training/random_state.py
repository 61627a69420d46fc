"""The states of all random number generators, of every process, as a checkpoint holds them."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

State = dict[str, Any]


def random_states() -> list[State]:
    """The state of every process, by rank; all of them must ask for it at the same time."""
    mine = _state()
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, mine)
    return states


def restore_random_state(
    states: Sequence[State], rank: int, seed: int, position: Sequence[int]
) -> None:
    """Makes this process draw on from where its rank was.

    On more processes than there were, those that are new draw from a seed made of the run's seed,
    the place in the data (epoch and batches) and their rank: it is theirs alone, and the same
    whenever this resume is repeated. On fewer, the states that are left over are dropped.
    """
    if rank < len(states):
        _restore(states[rank])
        return
    named = ",".join(map(str, (seed, *position, rank))).encode()
    own = int.from_bytes(hashlib.sha256(named).digest()[:4])
    torch.manual_seed(own)  # CUDA's, too
    random.seed(own)
    np.random.seed(own)


def _state() -> State:
    """In types that `torch.load(weights_only=True)` reads."""
    name, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.int64(keys)), int(place), int(has_gauss), float(gauss)),
    }


def _restore(state: State) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
