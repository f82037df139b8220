"""RMSNorm as a layer: the results of transformers, in eager mode and compiled."""

import pytest
import torch
from transformers.models.bitnet.modeling_bitnet import BitNetRMSNorm

from bitnet_triton.nn import BitLinear, RMSNorm
from bitnet_triton.testing import randn


def pair(D=80):
    theirs = BitNetRMSNorm(D, 1e-5)
    theirs.weight.data = 1 + 0.2 * randn(D)
    return theirs, RMSNorm.from_norm(theirs)


def step(norm, x, dy):
    x = x.detach().requires_grad_()
    y = norm(x)
    return y.detach(), *torch.autograd.grad(y, (x, norm.weight), dy)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_it_trains_as_the_norm_of_transformers(compiled):
    theirs, ours = pair()
    x, dy = randn(2, 5, 80), randn(2, 5, 80)
    expected = step(theirs, x, dy)
    module = torch.compile(ours, fullgraph=True) if compiled else ours
    for value, wanted in zip(step(module, x, dy), expected):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=2e-6)


def test_from_norm_shares_weight_and_state():
    theirs, ours = pair()
    assert ours.weight is theirs.weight
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.variance_epsilon == 1e-5
    assert repr(ours) == "RMSNorm(80, eps=1e-05)"


def test_autocast_keeps_the_widths_of_transformers():
    """Activations in bfloat16, weights in float32: the product is float32, then a linear casts."""
    theirs, ours = pair()
    x, linear = randn(3, 80).bfloat16(), BitLinear(80, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype == torch.float32
        assert linear(ours(x)).dtype == torch.bfloat16


def test_a_linear_may_hold_it():
    _, norm = pair()
    layer = BitLinear(80, 8, rms_norm=norm)
    layer(randn(3, 80)).square().sum().backward()
    assert norm.weight.grad.any()
    assert layer.weight.grad.any()
