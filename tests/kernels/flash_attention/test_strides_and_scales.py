"""Scales of any sign, and rows so far apart that their offsets need 64 bits."""

import pytest
import torch

from bitnet_triton import use_backend
from bitnet_triton.kernels import Mask, flash_attention
from bitnet_triton.runtime import backend_objection

pytestmark = pytest.mark.skipif(
    backend_objection("triton", torch.device("cpu")) is not None, reason="Triton cannot run here"
)
T, D = 300, 16
STRIDE = 2**23 - 16  # the largest that is not copied: 300 rows are 2.5 G elements


def attend(backend, q, k, v, dout, **settings):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with use_backend(backend):
        out = flash_attention(*leaves, **settings)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize(
    "mask", [Mask(window=9, global_tokens=(0, 290)), Mask(window=9, dilation=7)], ids=str
)
def test_rows_that_lie_far_apart_in_memory(mask):
    q, k, v, dout = (torch.randn(1, T, 1, D).to(torch.bfloat16) for _ in range(4))
    # never written but for the rows: pages that nobody touches take no memory
    spread = torch.empty(T * STRIDE, dtype=torch.bfloat16)
    far = spread.as_strided((1, T, 1, D), (T * STRIDE, STRIDE, D, 1)).copy_(q)
    expected = attend("triton", q, k, v, dout, mask=mask)
    for found, wanted in zip(attend("triton", far, k, v, dout, mask=mask), expected):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("Tq", [1, 40])
def test_a_scale_of_any_sign(scale, Tq):
    q, dout = (torch.randn(1, Tq, 2, D) for _ in range(2))
    k, v = (torch.randn(1, 40, 1, D) for _ in range(2))
    for mask in (Mask(), Mask(window=8, sinks=2)):
        found = attend("triton", q, k, v, dout, mask=mask, scale=scale)
        expected = attend("reference", q, k, v, dout, mask=mask, scale=scale)
        for actual, wanted in zip(found, expected):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
