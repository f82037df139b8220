"""Attention to the largest scores of each row, against the float64 reference.

Queries and keys stand on a lattice: their products are exact in every dtype, and many are equal. So
no rounding decides what is selected, and the rule for equal scores does it often.
"""

import pytest
import torch

from bitnet_triton import BackendUnavailableError, use_backend
from bitnet_triton.kernels import Mask, flash_attention
from bitnet_triton.kernels.flash_attention.reference import attention_reference

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


MASKS = {
    "top k": Mask(top_k=4),
    "threshold": Mask(threshold=0.3),
    "both": Mask(top_k=9, threshold=0.05, window=70, sinks=3),
    "both sides": Mask(causal=False, top_k=5, window=20, window_right=9),
    "dilation by head": Mask(window=9, dilation=(1, 3, 2, 4), sinks=2, top_k=4),
    "global tokens": Mask(window=9, global_tokens=(0, 77, 140), top_k=6),
    "dense rows": Mask(window=9, sinks=3, dense_from=100, top_k=6),
    "local": Mask(pattern="local", block=37, top_k=6, threshold=0.1),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_largest_scores_are_attended_to(name, compare, backend):
    compare(MASKS[name], lattice=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_select_alike(dtype, compare, backend):
    compare(Mask(top_k=11), dtype=dtype, D=64, Dv=64, lattice=True)


def test_rows_select_from_the_keys_that_are_valid(compare, device, backend):
    lengths = {"leftpad_k": int32(0, 120), "seqused_k": int32(110, 150)}
    given = {name: t.to(device) for name, t in lengths.items()}
    compare(Mask(top_k=5, sinks=2, window=40), lattice=True, **given)


def test_bounded_scores_are_selected(compare, backend):
    compare(Mask(top_k=5), softcap=1.5, lattice=True)


@pytest.mark.parametrize("Tq", [1, 3])
def test_a_step_selects(Tq, compare, backend):
    compare(Mask(top_k=5, window=100), Tq=Tq, Tk=300, H=8, Hk=2, lattice=True)


@pytest.mark.parametrize("mask", [Mask(top_k=150), Mask(threshold=1e-30)], ids=["k", "threshold"])
def test_a_selection_of_everything_is_dense(mask, device, backend, assert_as_right):
    q, k, v = (torch.randn(1, 150, heads, 32, device=device) for heads in (4, 2, 2))
    ours = flash_attention(q, k, v, mask=mask)
    assert_as_right(ours, flash_attention(q, k, v), q, k, v)


def test_the_reference_selects_what_topk_selects():
    q, k, v = (torch.randn(1, 12, 1, 32) for _ in "qkv")
    scores = (q[0, :, 0] @ k[0, :, 0].t() * 32**-0.5).masked_fill(~Mask().visible(12)[0, 0], -1e9)
    out, _ = attention_reference(q, k, v, mask=Mask(top_k=3), scale=32**-0.5)
    for i in range(12):
        best, at = scores[i, : i + 1].topk(min(3, i + 1))
        torch.testing.assert_close(out[0, i, 0], best.softmax(0) @ v[0, at, 0])
    largest, _ = attention_reference(q, k, v, mask=Mask(threshold=1.0), scale=1.0)
    torch.testing.assert_close(largest, v[:, scores.argmax(-1)])


def test_of_equal_scores_the_earlier_keys_are_taken(device, backend):
    q, k = (torch.ones(1, 70, 1, 16, device=device) for _ in "qk")
    v = torch.arange(70.0, device=device).view(1, 70, 1, 1)
    out = flash_attention(q, k, v, mask=Mask(top_k=3))
    expected = torch.tensor([0, 0.5] + 68 * [1.0], device=device)
    torch.testing.assert_close(out.flatten(), expected)
    # but all of them stand at the largest weight
    out = flash_attention(q, k, v, mask=Mask(threshold=1.0))
    torch.testing.assert_close(out.flatten(), torch.arange(70.0, device=device) / 2)


def test_zeros_of_either_sign_are_equal(device, backend):
    q, k = (torch.zeros(1, 8, 1, 16, device=device) for _ in "qk")
    q[..., 0], k[:, ::2, :, 0] = 1.0, -0.0
    v = torch.arange(8.0, device=device).view(1, 8, 1, 1)
    out = flash_attention(q, k, v, mask=Mask(top_k=2))
    torch.testing.assert_close(out.flatten()[1:], torch.full((7,), 0.5, device=device))


def test_packed_sequences_select_within_themselves(device, backend):
    q, k, v = (torch.randn(190, heads, 16, device=device) for heads in (4, 2, 2))
    q, k = q.mul(2).round(), k.mul(2).round()
    ends = [0, 130, 130, 190]
    cu = int32(*ends).to(device)
    mask = Mask(top_k=4, sinks=1)
    out = flash_attention(q, k, v, mask=mask, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for start, end in ((0, 130), (130, 190)):
        part = (t[None, start:end].double() for t in (q, k, v))
        expected, _ = attention_reference(*part, mask=mask, scale=0.25)
        torch.testing.assert_close(out[None, start:end].double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_patterns_of_several_bands_have_no_kernel(pattern, device, backend):
    q = torch.randn(1, 20, 2, 16, device=device)
    mask = Mask(pattern=pattern, block=4, top_k=3)
    with pytest.raises(BackendUnavailableError, match=f"under pattern '{pattern}'"):
        flash_attention(q, q, q, mask=mask)
    with use_backend("reference"):
        assert flash_attention(q, q, q, mask=mask).isfinite().all()
