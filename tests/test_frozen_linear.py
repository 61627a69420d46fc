import pytest
import torch
from torch import nn

from neo.training.frozen_linear import FrozenLinear, speed_up_frozen


def layers(shape, *, bias, dtype=torch.float32):
    """A frozen layer of torch and one of ours with the same weights."""
    torch.manual_seed(0)
    plain = nn.Linear(*shape, bias=bias, dtype=dtype).requires_grad_(False)
    ours = nn.Sequential(nn.Linear(*shape, bias=bias, dtype=dtype).requires_grad_(False))
    ours.load_state_dict({f"0.{name}": value for name, value in plain.state_dict().items()})
    speed_up_frozen(ours)
    assert type(ours[0]) is FrozenLinear
    return plain, ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
# small, and large enough for oneDNN
@pytest.mark.parametrize("shape", [(5, 7), (256, 512)])
@pytest.mark.parametrize("batch", [(3,), (2, 100), (0,)])
def test_a_frozen_linear_gives_the_output_and_the_gradient_of_torchs_own(bias, dtype, shape, batch):
    plain, ours = layers(shape, bias=bias, dtype=dtype)
    inputs = [torch.randn(*batch, shape[0], dtype=dtype).requires_grad_() for _ in range(2)]
    inputs[1].data = inputs[0].data.clone()
    outputs = [layer(x) for layer, x in zip((plain, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad(output, x, upstream)[0]
        for output, x in zip(outputs, inputs, strict=True)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def test_under_autocast_it_computes_in_autocasts_dtype():
    plain, ours = layers((256, 512), bias=True)
    x = torch.randn(200, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = plain(x), ours(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


def test_only_frozen_plain_linear_layers_are_replaced():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Other(2, 2), nn.Embedding(2, 2))
    model[1:].requires_grad_(False)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    speed_up_frozen(model)
    assert [type(layer) for layer in model] == [nn.Linear, FrozenLinear, Other, nn.Embedding]
    torch.testing.assert_close(dict(model.state_dict()), kept)


def test_weights_that_are_thawed_later_get_their_gradient():
    _, ours = layers((256, 512), bias=True)
    ours.requires_grad_(True)
    ours(torch.randn(200, 256)).sum().backward()
    assert ours[0].weight.grad is not None
