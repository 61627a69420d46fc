import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neo.training.optim import SCHEDULES, AdamW

unit = st.floats(0, 1)


@given(progress=unit, warmup=st.floats(0, 0.99), schedule=st.sampled_from(SCHEDULES))
def test_a_rate_lies_between_0_and_the_highest(progress, warmup, schedule):
    spec = AdamW(lr=0.5, warmup_ratio=warmup, schedule=schedule)
    assert 0 <= spec.rate(progress) <= 0.5


@given(a=unit, b=unit, schedule=st.sampled_from(SCHEDULES))
def test_a_rate_rises_in_the_warm_up_and_never_after_it(a, b, schedule):
    spec = AdamW(lr=1.0, warmup_ratio=0.3, schedule=schedule)
    first, second = sorted((a, b))
    if second <= 0.3:
        assert spec.rate(first) <= spec.rate(second)
    if first >= 0.3:
        assert spec.rate(first) >= spec.rate(second) - 1e-12


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.0), ("linear", 0.0), ("constant", 2.0)])
def test_a_rate_ends_where_its_schedule_says(schedule, end):
    spec = AdamW(lr=2.0, warmup_ratio=0.25, schedule=schedule)
    assert spec.rate(0.0) == 0.0
    assert spec.rate(0.25) == 2.0
    assert spec.rate(1.0) == pytest.approx(end)


def test_a_cosine_is_halfway_down_in_the_middle():
    assert AdamW(lr=1.0, warmup_ratio=0.0).rate(0.5) == pytest.approx(0.5)
    quarter = 0.5 + 0.5 * math.cos(math.pi / 4)
    assert AdamW(lr=1.0, warmup_ratio=0.0).rate(0.25) == pytest.approx(quarter)


def test_without_a_warm_up_the_first_rate_is_the_highest():
    for schedule in SCHEDULES:
        assert AdamW(lr=3.0, warmup_ratio=0.0, schedule=schedule).rate(0.0) == 3.0


def test_vectors_do_not_decay_and_every_parameter_is_in_one_group():
    parameters = {
        "matrix": nn.Parameter(torch.ones(2, 2)),
        "norm": nn.Parameter(torch.ones(2)),
        "bias": nn.Parameter(torch.ones(3)),
    }
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(parameters)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[id(p)] for p in parameters.values()] == [0.5, 0.0, 0.0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 3


def test_a_step_is_that_of_torchs_adamw():
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 3), torch.randn(3, 3)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    keys = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    for optimizer, parameter in (
        (AdamW(**keys).build({"w": ours}), ours),
        (torch.optim.AdamW([theirs], **keys), theirs),
    ):
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": 0.0}, r"optim.lr=0.0: must be a finite number above 0"),
        ({"lr": -1.0}, r"optim.lr=-1.0"),
        ({"lr": math.inf}, r"optim.lr=inf"),
        ({"lr": math.nan}, r"optim.lr=nan"),
        ({"betas": (0.9, 1.0)}, r"optim.betas=\[0.9, 1.0\]: must be two numbers in \[0, 1\)"),
        ({"eps": 0.0}, r"optim.eps=0.0: must be above 0"),
        ({"weight_decay": -0.1}, r"optim.weight_decay=-0.1: must not be negative"),
        ({"schedule": "cosin"}, r"optim.schedule='cosin': must be one of cosine, linear, constant"),
        ({"warmup_ratio": 1.0}, r"optim.warmup_ratio=1.0: must lie in \[0, 1\)"),
    ],
)
def test_a_value_that_cannot_train_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**{"lr": 0.1, **keys})


def test_betas_may_come_from_yaml_as_a_list():
    from neo.config import build

    spec = build({"_target_": "neo.training.optim.AdamW", "lr": 0.1, "betas": [0.8, 0.9]})
    assert tuple(spec.betas) == (0.8, 0.9)
