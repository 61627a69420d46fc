import functools

import pytest
import torch

from neo.losses.chunk import BLOCK_ELEMENTS, ChunkSums, differentiate_chunk
from neo.losses.comparisons import ByLogits
from neo.losses.distillation import Distillation
from neo.losses.divergences import cross_entropy, forward_kl, jsd, reverse_kl

TOKENS, VOCAB = 13, 29


def expected(s, t, targets, spec):
    """Sums and gradient by autograd, from the definitions."""
    s = s.clone().requires_grad_()
    ce = cross_entropy(s, targets).sum()
    kd = spec.divergence(s, t, temperature=spec.temperature).sum()
    loss = (1 - spec.kd_ratio) * ce + spec.kd_ratio * kd
    return ce.detach(), kd.detach(), torch.autograd.grad(loss, s)[0]


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, functools.partial(jsd, beta=0.3)])
@pytest.mark.parametrize(
    ("kd_ratio", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.9, 2.5), (1.0, 0.5)]
)
@pytest.mark.parametrize("block_rows", [1, 5, 100])
def test_a_chunk_adds_the_sums_and_leaves_the_gradient_of_the_definitions(
    divergence, kd_ratio, temperature, block_rows, monkeypatch
):
    monkeypatch.setitem(BLOCK_ELEMENTS, "cpu", block_rows * VOCAB)
    torch.manual_seed(0)
    s, t = (3 * torch.randn(TOKENS, VOCAB, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(VOCAB, (TOKENS,))
    spec = Distillation(divergence=divergence, kd_ratio=kd_ratio, temperature=temperature)
    ce, kd, gradient = expected(s, t, targets, spec)
    sums, logits = ChunkSums(s.dtype, s.device), s.clone()
    differentiate_chunk(logits, ByLogits(t), targets, spec, sums, gradient=True, softcap=None)
    torch.testing.assert_close(sums.ce, ce)
    torch.testing.assert_close(sums.kd, kd)
    torch.testing.assert_close(logits, gradient)
    assert sums.agree == (s.argmax(-1) == t.argmax(-1)).sum()


def test_without_a_gradient_only_the_sums_are_made():
    torch.manual_seed(0)
    s, t = torch.randn(TOKENS, VOCAB), torch.randn(TOKENS, VOCAB)
    targets = torch.randint(VOCAB, (TOKENS,))
    sums = ChunkSums(s.dtype, s.device)
    kept = s.clone()
    differentiate_chunk(s, ByLogits(t), targets, Distillation(), sums, gradient=False, softcap=None)
    torch.testing.assert_close(sums.ce, cross_entropy(kept, targets).sum())
    torch.testing.assert_close(sums.kd, forward_kl(kept, t).sum())
