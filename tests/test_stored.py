from functools import partial

import pytest

from neo.losses.distillation import Distillation
from neo.losses.divergences import (
    adaptive_kl,
    forward_kl,
    jsd,
    reverse_kl,
    skew_reverse_kl,
)
from neo.teachers.stored import KINDS, Stored

WRONG = [
    (dict(kind="logits"), ["kind='logits': must be one of projected, hidden"]),
    (dict(kind="top_k", k=0), ["k=0: must be a whole number of at least 1"]),
    (dict(kind="top_k", k=True), ["k=True: must be a whole"]),
    (dict(kind="projected", k=3), ["k=3: is of kind=top_k or top_p or sampled, and this"]),
    (dict(kind="top_k", samples=3), ["samples=3: is of kind=sampled, and this is 'top_k'"]),
    (dict(kind="sampled", samples=0), ["samples=0: must be a whole number"]),
    (dict(kind="sampled", missing="other"), ["missing='other': is of kind=top_k or top_p"]),
    (dict(kind="sampled", proposal=0), ["proposal=0: must lie between 0.4 and 1.25"]),
    (dict(kind="sampled", k=60_000, samples=6_000), ["k + samples=66000: must be at most 65535"]),
    (dict(kind="top_p", p=0), ["p=0: must lie in (0, 1]"]),
    (dict(kind="top_p", p=float("nan")), ["p=nan: must lie in (0, 1]"]),
    (dict(kind="top_p", missing="drop"), ["missing='drop': must be one of other, renormalise"]),
    (dict(kind="projected", values="fixed16"), ["values='fixed16': must be one of float32, bfl"]),
    (dict(kind="hidden", values="int8"), ["values='int8': must be one of float32, bfloat16, flo"]),
    (dict(kind="hidden", temperature=2), ["temperature=2: must be 1 for kind='hidden'"]),
    (dict(kind="projected", temperature=0), ["temperature=0: must be a finite number above 0"]),
    (dict(kind="projected", temperature=float("inf")), ["temperature=inf: must be a finite"]),
    (dict(kind="sampled", seed=-1), ["seed=-1: must be a whole number from 0"]),
    (dict(kind="top_k", k=0, p=0.5, seed=-5), ["p=0.5: is of kind=top_p", "k=0:", "seed=-5:"]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "messages"), WRONG, ids=str)
def test_what_cannot_be_kept_is_refused_with_every_problem(keys, messages):
    with pytest.raises(ValueError, match=r"must|is of") as error:
        Stored(**keys)
    lines = str(error.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert message in line


def test_what_is_left_out_has_the_default_of_its_kind():
    assert Stored(kind="projected").resolved().as_dict() == {
        "kind": "projected", "temperature": 1.0, "values": "float32", "seed": 0,
    }  # fmt: skip
    assert Stored(kind="top_k", temperature=2).resolved().as_dict() == {
        "kind": "top_k", "temperature": 2.0, "values": "fixed16", "k": 64, "missing": "other",
        "seed": 0,
    }  # fmt: skip
    assert Stored(kind="top_p").resolved().p == 0.95
    sampled = Stored(kind="sampled", seed=3).resolved()
    assert (sampled.samples, sampled.proposal, sampled.k, sampled.seed) == (64, 1.0, None, 3)
    for kind in KINDS:
        once = Stored(kind=kind).resolved("bfloat16")
        assert once.resolved() == once == Stored(**once.as_dict())


def test_a_seed_counts_only_where_something_is_random():
    assert Stored(kind="projected", seed=5).resolved() == Stored(kind="projected").resolved()
    assert Stored(kind="projected", values="int8", seed=5).resolved().seed == 5


def test_hidden_states_keep_the_dtype_they_come_in_unless_another_is_asked_for():
    hidden = Stored(kind="hidden")
    assert hidden.resolved().values is None
    assert hidden.resolved("bfloat16").values == "bfloat16"
    assert hidden.resolved("float64").values == "float32"
    assert Stored(kind="hidden", values="float16").resolved("bfloat16").values == "float16"


def kept(kind, **keys):
    return Stored(kind=kind, **keys)


SERVED = [
    (kept("projected"), dict(divergence=forward_kl)),
    (kept("projected"), dict(divergence=partial(partial(forward_kl)))),
    (kept("projected", temperature=2), dict(temperature=2.0)),
    *((kept("hidden"), dict(divergence=d, temperature=3)) for d in (forward_kl, jsd, adaptive_kl)),
    *((kept("top_k"), dict(divergence=d)) for d in (forward_kl, jsd, reverse_kl, adaptive_kl)),
    (kept("top_k", missing="renormalise"), dict(divergence=partial(jsd, beta=0.3))),
    (kept("top_p", missing="renormalise"), dict(divergence=partial(skew_reverse_kl, skew=0.1))),
    (kept("sampled"), {}),
]
REFUSED = [
    (kept("projected"), dict(divergence=jsd), "loss.divergence=jsd: kind=projected keeps what"),
    (kept("projected"), dict(divergence=partial(jsd, beta=0.2)), "loss.divergence=jsd"),
    *((kept(kind), dict(temperature=2), "loss.temperature=2: kind=") for kind in KINDS
      if kind != "hidden"),
    *((kept(kind), dict(kd_positions="release"), "loss.kd_positions=release") for kind in KINDS),
    (kept("top_k", missing="renormalise"), dict(divergence=reverse_kl), "is infinite where"),
    (kept("top_p", missing="renormalise"), dict(divergence=adaptive_kl), "is infinite where"),
    (kept("top_p", missing="renormalise"), dict(divergence=partial(skew_reverse_kl, skew=0)),
     "is infinite where"),
    (kept("sampled"), dict(divergence=jsd), "a sample is unbiased for what is linear"),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "keys"), SERVED)
def test_a_loss_that_can_be_computed_is_not_refused(stored, keys):
    assert stored.given_refusals(Distillation(**keys)) == []


@pytest.mark.parametrize(("stored", "keys", "message"), REFUSED)
def test_a_loss_that_cannot_be_computed_is_refused_with_the_reason(stored, keys, message):
    (reason,) = stored.given_refusals(Distillation(**keys))
    assert message in reason


def test_a_head_that_changes_or_bounds_its_logits_is_refused_of_a_projection_alone():
    for kind in KINDS:
        found = kept(kind).given_refusals(Distillation(), head_changes=True, softcap=30.0)
        reasons = "trained or adapted", "bounds its logits (softcap=30.0)"
        assert len(found) == (2 if kind == "projected" else 0)
        assert all(reason in line for reason, line in zip(reasons, found, strict=False))
