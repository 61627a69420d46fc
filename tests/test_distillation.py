import dataclasses
import functools
import math

import pytest
import torch

from neo.losses.distillation import Distillation, TokenSums
from neo.losses.divergences import forward_kl, jsd


def token_sums(scale, *, teacher=True):
    def number(value):
        return torch.tensor(float(value * scale))

    return TokenSums(
        loss=number(1).requires_grad_(),
        ce=number(2),
        kd=number(3) if teacher else None,
        tokens=torch.tensor(4 * scale),
        student_entropy=number(5),
        agree=torch.tensor(6 * scale) if teacher else None,
        teacher_target=number(7) if teacher else None,
        teacher_mass_out=number(8) if teacher else None,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kd_ratio": 1.5}, "loss.kd_ratio=1.5: must lie in [0, 1]"),
        ({"kd_ratio": -0.1}, "loss.kd_ratio=-0.1: must lie in [0, 1]"),
        ({"kd_ratio": math.nan}, "loss.kd_ratio=nan: must lie in [0, 1]"),
        ({"temperature": -1.0}, "loss.temperature=-1.0: must be a finite number above 0"),
        ({"temperature": 0.0}, "loss.temperature=0.0: must be a finite number above 0"),
        ({"chunk_gib": 0}, "loss.chunk_gib=0: must be above 0, or null"),
        ({"chunk_gib": math.nan}, "loss.chunk_gib=nan: must be above 0, or null"),
        ({"chunk_gib": math.inf}, "loss.chunk_gib=inf: must be above 0, or null"),
        (
            {"kd_positions": "released"},
            "loss.kd_positions='released': must be one of aligned, release",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_with_place_value_and_range(wrong, message):
    with pytest.raises(ValueError, match="loss") as error:
        Distillation(**wrong)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("wrong", "gives"),
    [
        (lambda s, t, temperature: (s - t).square().mean(), r"\(\) for two tokens"),
        (lambda s, t, temperature: (s - t).square(), r"\(2, 3\) for two tokens"),
        (lambda s, t, temperature: 0.5, "0.5 for two tokens"),
    ],
)
def test_a_divergence_that_is_not_one_number_a_token_is_refused(wrong, gives):
    with pytest.raises(ValueError, match=rf"loss\.divergence: gives {gives}; must be one number"):
        Distillation(divergence=wrong)


def test_all_problems_of_a_spec_are_named_at_once():
    with pytest.raises(ValueError, match="loss") as error:
        Distillation(kd_ratio=2.0, temperature=0.0, chunk_gib=0, kd_positions="")
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "loss.kd_ratio",
        "loss.temperature",
        "loss.chunk_gib",
        "loss.kd_positions",
    ]


def test_a_divergence_with_a_wrong_parameter_is_refused_before_any_token_is_seen():
    with pytest.raises(ValueError, match=r"loss\.divergence: beta=1\.5: must lie in \(0, 1\)"):
        Distillation(divergence=functools.partial(jsd, beta=1.5))


def test_a_divergence_with_a_misspelt_parameter_is_refused_before_any_token_is_seen():
    with pytest.raises(ValueError, match=r"loss\.divergence: .*'bet'"):
        Distillation(divergence=functools.partial(jsd, bet=0.5))


def test_the_default_is_forward_kl_with_equal_weights_at_temperature_1():
    spec = Distillation()
    assert (spec.divergence, spec.kd_ratio, spec.temperature) == (forward_kl, 0.5, 1.0)
    assert spec.kd_positions == "aligned"


@pytest.mark.parametrize("teacher", [True, False])
def test_sums_of_two_parts_are_the_sums_of_the_whole(teacher):
    total = token_sums(1, teacher=teacher) + token_sums(10, teacher=teacher)
    expected = token_sums(11, teacher=teacher)
    for field in dataclasses.fields(TokenSums):
        assert getattr(total, field.name) == getattr(expected, field.name)


def test_what_needs_a_teacher_stays_none_without_one():
    total = token_sums(1, teacher=False) + token_sums(2, teacher=False)
    needed = (total.kd, total.agree, total.teacher_target, total.teacher_mass_out)
    assert needed == (None,) * 4
    assert total.student_entropy == 15


def test_sums_with_and_without_a_teacher_do_not_add_up():
    with pytest.raises(ValueError, match="with and without a teacher"):
        token_sums(1) + token_sums(1, teacher=False)


def test_adding_keeps_the_gradient_of_the_loss_and_detaching_ends_it():
    a, b = token_sums(1), token_sums(2)
    (a + b).loss.backward()
    assert a.loss.grad == b.loss.grad == 1
    assert not (a + b).detach().loss.requires_grad
