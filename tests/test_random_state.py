import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from neo.training.random_state import random_states, restore_random_state


def draw():
    """What every generator gives next."""
    return [random.random(), np.random.rand(), float(torch.rand(())), random.gauss(0, 1)]


@pytest.fixture(autouse=True)
def unchanged():
    kept = random_states()
    yield
    restore_random_state(kept, 0, 0, (0, 0))


def through_a_file(states, file):
    torch.save({"rng": states}, file)
    return torch.load(file, weights_only=True)["rng"]


def test_what_is_drawn_after_a_resume_is_what_would_have_been_drawn(tmp_path):
    random.gauss(0, 1)  # keeps a second number for the next call
    np.random.randn()
    states = through_a_file(random_states(), tmp_path / "state.pt")
    assert len(states) == 1
    expected = [*draw(), np.random.randn()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert [*draw(), np.random.randn()] != expected
    restore_random_state(states, 0, seed=0, position=(0, 0))
    assert [*draw(), np.random.randn()] == expected


def test_a_new_rank_draws_its_own_numbers_the_same_at_every_resume():
    states = random_states()

    def drawn(rank, **changed):
        restore_random_state(states, rank, **{"seed": 0, "position": (1, 7), **changed})
        return draw()

    old = drawn(0)
    new = drawn(1)
    assert new != old
    assert drawn(1) == new
    assert drawn(2) != new
    assert drawn(1, seed=1) != new
    assert drawn(1, position=(1, 8)) != new
    assert drawn(0, position=(3, 3)) == old


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_generator_is_kept_too():
    states = random_states()
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(9)
    restore_random_state(states, 0, 0, (0, 0))
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def _rank(rank, file, folder):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    states = random_states()
    drawn = draw()
    again = []
    for of_rank in (0, 1):
        restore_random_state(states, of_rank, 0, (0, 0))
        again.append(draw())
    torch.save((drawn, again), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_rank_keeps_the_states_of_all_and_takes_its_own(tmp_path):
    mp.spawn(_rank, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    (drawn_0, again_0), (drawn_1, again_1) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert drawn_0 != drawn_1
    assert again_0 == again_1 == [drawn_0, drawn_1]
