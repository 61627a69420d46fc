import math

import pytest
import torch

from neo.losses.probabilities import kl, log_mixture, log_probabilities


def test_log_probabilities_are_those_of_the_softened_logits_in_the_wider_dtype():
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    log_q, log_p = log_probabilities(student.half(), teacher.double(), 2.0)
    assert log_q.dtype == log_p.dtype == torch.float64
    torch.testing.assert_close(log_p.exp(), (teacher.double() / 2).softmax(-1))
    torch.testing.assert_close(log_q.exp(), (student.half().double() / 2).softmax(-1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature=.* finite number above 0"):
        log_probabilities(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_a_mixture_weighs_its_second_part():
    a, b = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    torch.testing.assert_close(log_mixture(a.log(), b.log(), 0.25).exp(), 0.75 * a + 0.25 * b)
    torch.testing.assert_close(log_mixture(a.log(), b.log(), 0), a.log())


def test_kl_is_its_sum_and_counts_nothing_where_the_first_has_no_probability():
    a, b = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    torch.testing.assert_close(kl(a.log(), b.log()), torch.tensor([0.5 * math.log(2)]))
    assert kl(b.log(), a.log()).isposinf().all()


def test_kl_of_models_that_almost_agree_keeps_its_digits_in_float32():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = logits + 1e-3 * logits.sin()
    a, b = (x.float().log_softmax(-1) for x in (logits, near))
    exact = kl(logits.log_softmax(-1), near.log_softmax(-1))
    torch.testing.assert_close(kl(a, b).double(), exact, rtol=1e-2, atol=0)
