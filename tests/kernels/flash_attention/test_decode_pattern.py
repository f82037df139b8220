"""Decode under patterns: one query, the keys that it sees and no others."""

import pytest
import torch

from bitnet_triton.kernels import Mask
from bitnet_triton.kernels.flash_attention import decode
from bitnet_triton.kernels.flash_attention.decode_pattern import (
    decode_pattern_objection,
    launch_decode_pattern,
)
from bitnet_triton.kernels.flash_attention.operands import SinkQuery
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.kernels.rotary.reference import rotary_reference
from bitnet_triton.runtime import backend_objection
from bitnet_triton.testing import assert_close
from bitnet_triton.triton_cpu import capture

SCALE = 0.125
MASKS = [
    Mask(),
    Mask(causal=False),
    Mask(window=37, sinks=5),
    Mask(window=5, sinks=300),
    Mask(pattern="local", block=64),
    Mask(pattern="local", block=1),
    Mask(pattern="strided", block=1),
    Mask(pattern="strided", block=7),
    Mask(pattern="fixed", block=16, summary=3),
    Mask(pattern="fixed", block=8, summary=8),
    Mask(window=20, dilation=3),
    Mask(dilation=5),
    Mask(window=9, dilation=2, sinks=4, global_tokens=(0, 6, 7, 20, 283, 5000)),
    Mask(window=16, global_tokens=(299, 3)),
    Mask(window=16, global_tokens=(1, 289, 290, 1, 8)),
    Mask(pattern="local", block=50, window=30, dilation=2, sinks=3, global_tokens=(2, 4, 100)),
    Mask(pattern="strided", block=6, window=40, dilation=4, sinks=7, global_tokens=(3, 50, 251)),
    Mask(pattern="fixed", block=12, summary=2, window=50, dilation=3, sinks=9,
         global_tokens=(1, 9, 22, 23, 259)),
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    backend_objection("triton", torch.device("cpu")) is not None, reason="Triton cannot run here"
)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def draw(Tk, B=2, H=4, Hk=2, D=32, Dv=None, dtype=torch.float32):
    """Return q, and k and v as a cache of transformers holds them, seen as [B Tk Hk D]."""
    q = torch.randn(B, 1, H, D)
    k, v = (torch.randn(B, Hk, Tk, d).transpose(1, 2) for d in (D, Dv or D))
    return [t.to(dtype) for t in (q, k, v)]


@pytest.fixture
def check(largest_error):
    """A function that compares one call with the reference."""

    def check(mask, inputs, **settings):
        out, lse = launch_decode_pattern(*inputs, mask=mask, scale=SCALE, **settings)
        reference = {"mask": mask, "scale": SCALE, **settings}
        exact, exact_lse = attention_reference(*(t.double() for t in inputs), **reference)
        eager, _ = attention_reference(*inputs, **reference)
        # keys are added split by split, where the reference adds pairwise and is more exact
        worst = largest_error(*inputs, **reference) if out.dtype == torch.float32 else None
        assert_close("out", out, exact, eager=eager, worst=worst)
        seen = torch.isfinite(exact_lse)
        assert torch.equal(torch.isfinite(lse), seen)
        assert (lse[~seen] == float("-inf")).all()
        assert_close("lse", lse[seen], exact_lse[seen])

    return check


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_query_sees_what_its_mask_says(mask, check):
    check(mask, draw(300))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_padding_and_memory_behind_the_text_are_not_read(mask, check):
    inputs = draw(300)
    left, used = (3, 120), (260, 121)
    for row in range(2):
        for t in inputs[1:]:
            t[row, : left[row]] = t[row, used[row] :] = float("nan")
    check(mask, inputs, leftpad_k=int32(*left), seqused_k=int32(*used))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_each_length_of_a_text_is_right(mask, monkeypatch):
    """All at once, a row a length; short of a window and of a block, and at their ends."""
    monkeypatch.setattr(decode, "_KEYS_OF_SPLIT", 16)
    q, k, v = draw(64, B=66)
    settings = {"mask": mask, "scale": SCALE, "seqused_k": torch.arange(66).int().clamp_max(64)}
    out, lse = launch_decode_pattern(q, k, v, **settings)
    exact, exact_lse = attention_reference(*(t.double() for t in (q, k, v)), **settings)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert not out[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ({"H": 1, "Hk": 1, "D": 16}, Mask(pattern="fixed", block=32, summary=2)),
        ({"H": 4, "Hk": 2, "D": 64}, Mask(pattern="strided", block=24)),
        ({"H": 4, "Hk": 1, "D": 128}, Mask(pattern="local", block=128)),
        ({"H": 10, "Hk": 2, "D": 80, "Dv": 96}, Mask(window=90, dilation=3, sinks=2)),
        ({"H": 16, "Hk": 1, "D": 256, "B": 1}, Mask(window=99, global_tokens=(0, 5, 180))),
    ],
    ids=str,
)
def test_heads_of_every_size_match_the_reference(shape, mask, dtype, check):
    check(mask, draw(599, dtype=dtype, **shape))


def test_a_softcap_matches_the_reference(check):
    check(Mask(pattern="strided", block=16), draw(300), softcap=2.0)


@pytest.mark.parametrize("most", [1, 2, 7, 64])
def test_the_number_of_splits_changes_nothing_but_rounding(most, monkeypatch, check):
    monkeypatch.setattr(decode, "_MOST_SPLITS", most)
    monkeypatch.setattr(decode, "_KEYS_OF_SPLIT", 8)
    check(Mask(pattern="fixed", block=64, summary=5, sinks=9), draw(700))


@pytest.mark.parametrize(
    "mask",
    [Mask(pattern=p, block=40) for p in ("local", "strided", "fixed")]
    + [Mask(window=30, dilation=2, global_tokens=(0, 9, 900))],
    ids=str,
)
def test_a_recorded_step_serves_later_lengths(mask):
    q, k, v = draw(1000)
    used, left = int32(5, 600), int32(0, 3)
    settings = {"mask": mask, "scale": SCALE, "seqused_k": used, "leftpad_k": left}
    launch_decode_pattern(q, k, v, **settings)
    with capture() as graph:
        out, lse = launch_decode_pattern(q, k, v, **settings)
    used.copy_(int32(901, 1000))
    left.copy_(int32(0, 20))
    q.copy_(torch.randn_like(q))
    graph.replay()
    expected = launch_decode_pattern(q, k, v, **settings)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def angles(P, D):
    angle = torch.arange(P)[:, None] / 100.0 ** (torch.arange(0, D, 2) / D)
    return (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [32, 80])
def test_first_tokens_are_met_at_another_position(D, dtype):
    """Rows short of the window, with some of the sinks behind it, and with all."""
    window, sinks, H = 12, 5, 6
    used, left = int32(0, 7, 13, 15, 90, 70), int32(0, 0, 0, 0, 3, 69)
    B = used.shape[0]
    q, k, v = draw(100, B=B, H=H, D=D, dtype=dtype)
    heads, (cos, sin) = torch.randn(B, 1, H + 4, D, dtype=dtype), angles(100, D)
    cos, sin = cos.to(dtype), sin.to(dtype)
    positions, last = int32(0, 6, 12, 14, 86, 0), sinks + window - 1
    far = positions.clamp_max(last).long()
    far_q = rotary_reference(heads[:, :, :H], cos[far][:, None], sin[far][:, None])
    out, lse = launch_decode_pattern(
        q, k, v, mask=Mask(window=window, sinks=sinks), scale=SCALE,
        leftpad_k=left, seqused_k=used,
        sink_query=SinkQuery(heads, cos, sin, last), positions=positions,
    )  # fmt: skip

    k, v = (t.double().repeat_interleave(H // 2, 2) for t in (k, v))
    near, away = (torch.einsum("bihd,bjhd->bhij", t.double(), k) for t in (q, far_q))
    j = torch.arange(100) - left[:, None]
    p = (used - left - 1)[:, None]
    is_near = (j >= 0) & (j <= p) & (p - j < window)
    is_away = (j >= 0) & (j < sinks) & (p - j >= window)
    scores = torch.where(is_away[:, None, None], away, near) * SCALE
    is_seen = (is_near | is_away)[:, None, None]
    weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1).nan_to_num()
    exact = torch.einsum("bhij,bjhd->bihd", weights, v)
    assert_close("out", out, exact, worst=1e-5 if dtype == torch.float32 else 3e-2)
    assert (lse[0] == float("-inf")).all()
    expected = scores.masked_fill(~is_seen, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("Tq", "mask", "word"),
    [
        (2, Mask(pattern="local", block=4), "takes one query"),
        (1, Mask(dilation=2, dense_from=3), "dense_from"),
        (1, Mask(dilation=(1, 2)), "one `dilation` for all heads"),
        (1, Mask(global_tokens=torch.zeros(1, 4, dtype=torch.bool)), "as positions"),
    ],
)
def test_what_decoding_cannot_do_is_named(Tq, mask, word):
    q, k = torch.randn(1, Tq, 2, 16), torch.randn(1, 40, 2, 16)
    assert word in decode_pattern_objection(q, k, mask)
    assert decode_pattern_objection(q[:, :1], k, Mask(dilation=(2, 2), sinks=1)) is None
