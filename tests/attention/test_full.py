"""Full attention against its formula."""

import pytest
import torch

from bitnet_triton.attention import AttentionContext
from bitnet_triton.attention.full import Full


def formula(q, k, v, is_visible, scale):
    k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    weights = scores.masked_fill(~is_visible, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("Hk", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 7])
def test_without_a_mask_attention_is_causal(T, Hk, device):
    q = torch.randn(2, T, 4, 16, device=device, dtype=torch.float64)
    k, v = torch.randn(2, 2, T, Hk, 16, device=device, dtype=torch.float64)
    y = Full()(q, k, v, AttentionContext(0, "prefill", None, 0.3))
    is_visible = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    torch.testing.assert_close(y, formula(q, k, v, is_visible, 0.3))


def test_one_token_reads_every_key(device):
    q = torch.randn(2, 1, 4, 16, device=device, dtype=torch.float64)
    k, v = torch.randn(2, 2, 9, 2, 16, device=device, dtype=torch.float64)
    y = Full()(q, k, v, AttentionContext(0, "decode", None, 0.25))
    torch.testing.assert_close(
        y, formula(q, k, v, torch.ones(1, 9, dtype=torch.bool, device=device), 0.25)
    )


def test_a_mask_hides_keys(device):
    q = torch.randn(2, 5, 4, 16, device=device, dtype=torch.float64)
    k, v = torch.randn(2, 2, 8, 2, 16, device=device, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 8, device=device) < 0.5
    mask[..., 0] = True
    y = Full()(q, k, v, AttentionContext(0, "prefill", mask, 0.25))
    torch.testing.assert_close(y, formula(q, k, v, mask, 0.25))
