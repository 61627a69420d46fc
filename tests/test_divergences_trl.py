import pytest
import torch

from neo.losses.divergences import forward_kl, jsd, reverse_kl

TEMPERATURES = [0.25, 1.0, 2.0, 8.0]


@pytest.fixture(scope="module")
def trl_jsd():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


@pytest.fixture(scope="module")
def trl_chunked_divergence():
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply


def ours_by_their_beta(beta):
    """TRL's beta is ours in between; at its ends it names the two KLs."""
    if beta in (0.0, 1.0):
        return forward_kl if beta == 0.0 else reverse_kl
    return lambda student, teacher, **options: jsd(student, teacher, beta=beta, **options)


def random_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 6, 11, generator=generator, dtype=dtype)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl_has_the_same_divergence_without_the_temperature_squared(trl_jsd, beta, temperature):
    student, teacher = random_logits(torch.float64).requires_grad_()
    ours = ours_by_their_beta(beta)(student, teacher, temperature=temperature)
    theirs = trl_jsd(student, teacher, beta=beta, temperature=temperature, reduction="none").sum(-1)
    torch.testing.assert_close(ours, temperature**2 * theirs)
    ours_gradient, theirs_gradient = (
        torch.autograd.grad(value.sum(), student, retain_graph=True)[0]
        for value in (ours, temperature**2 * theirs)
    )
    torch.testing.assert_close(ours_gradient, theirs_gradient)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_closed_form_in_trls_kernel_is_the_same_gradient(
    trl_chunked_divergence, beta, temperature
):
    student, teacher = random_logits(torch.float32)
    leaf = student.clone().requires_grad_()
    ours = ours_by_their_beta(beta)(leaf, teacher, temperature=temperature)
    hidden = student.clone().requires_grad_()
    head = torch.eye(student.shape[-1])
    theirs, _ = trl_chunked_divergence(hidden, head, None, teacher, head, None, beta, temperature)
    torch.testing.assert_close(ours, temperature**2 * theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), leaf)[0],
        torch.autograd.grad(temperature**2 * theirs.sum(), hidden)[0],
        rtol=1e-5,
        atol=1e-5,
    )
