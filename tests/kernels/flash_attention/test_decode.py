"""Decode: few queries, many keys, read in shares."""

import pytest
import torch

from bitnet_triton import use_backend
from bitnet_triton.kernels import Mask, flash_attention
from bitnet_triton.kernels.flash_attention import decode
from bitnet_triton.kernels.flash_attention.decode import decode_objection, launch_decode
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.runtime import backend_objection
from bitnet_triton.testing import assert_close
from bitnet_triton.triton_cpu import capture

SCALE = 0.125

pytestmark = pytest.mark.skipif(
    backend_objection("triton", torch.device("cpu")) is not None, reason="Triton cannot run here"
)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def draw(Tq, Tk, B=2, H=4, Hk=2, D=64, Dv=64, dtype=torch.float32):
    """Return q, and k and v as a cache of transformers holds them, seen as [B Tk Hk D]."""
    q = torch.randn(B, Tq, H, D)
    k, v = (torch.randn(B, Hk, Tk, d).transpose(1, 2) for d in (D, Dv))
    return [t.to(dtype) for t in (q, k, v)]


@pytest.fixture
def check(largest_error):
    """A function that compares one call with the reference."""

    def check(mask, inputs, **settings):
        out, lse = launch_decode(*inputs, mask=mask, scale=SCALE, **settings)
        reference = {"mask": mask, "scale": SCALE, **settings}
        exact, exact_lse = attention_reference(*(t.double() for t in inputs), **reference)
        eager, _ = attention_reference(*inputs, **reference)
        # keys are added share by share, where the reference adds pairwise and is the more exact one
        worst = largest_error(*inputs, **reference) if out.dtype == torch.float32 else None
        assert_close("out", out, exact, eager=eager, worst=worst)
        seen = torch.isfinite(exact_lse)
        assert torch.equal(torch.isfinite(lse), seen)
        assert_close("lse", lse[seen], exact_lse[seen])

    return check


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=False),
        Mask(window=700, sinks=5),
        Mask(window=50, sinks=1100),
        Mask(causal=False, window=50, window_right=2, sinks=1199),
        Mask(window=50, sinks=3, dense_from=1198),
        Mask(window=50, dense_from=int32(10, 2000)),
    ],
    ids=str,
)
def test_four_queries_match_the_reference(mask, check):
    check(mask, draw(4, 1200))


@pytest.mark.parametrize(
    "shape",
    [
        {"Tk": 1},
        {"Tk": 513, "H": 5, "Hk": 1, "B": 1},
        {"Tk": 600, "H": 2, "D": 80, "Dv": 96},
        {"Tk": 600, "dtype": torch.bfloat16, "D": 128, "Dv": 128},
        {"Tk": 600, "dtype": torch.float16},
    ],
    ids=str,
)
def test_one_query_matches_the_reference(shape, check):
    check(Mask(), draw(1, **shape))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_neither_read_nor_answered(causal, check):
    q, k, v = draw(4, 1200)
    lengths = {"leftpad_k": int32(3, 799), "seqused_k": int32(1100, 801)}
    for row, (left, used) in enumerate([(3, 1100), (799, 801)]):
        for t in (k, v):
            t[row, :left] = t[row, used:] = float("nan")
    check(Mask(causal=causal, window=500, sinks=3), (q, k, v), **lengths)
    out, _ = launch_decode(q, k, v, mask=Mask(causal=causal), scale=SCALE, **lengths)
    assert out[1, :2].eq(0).all()
    assert out[1, 2:].ne(0).any()


def test_a_row_without_keys_gives_zeros(check):
    check(Mask(), draw(2, 600), seqused_k=int32(0, 600))


def test_a_softcap_matches_the_reference(check):
    check(Mask(), draw(1, 600), softcap=2.0)


def test_the_number_of_splits_changes_nothing_but_rounding(monkeypatch, check):
    inputs = draw(1, 2000)
    for most in (1, 2, 7, 64):
        monkeypatch.setattr(decode, "_MOST_SPLITS", most)
        monkeypatch.setattr(decode, "_KEYS_OF_SPLIT", 32)
        check(Mask(sinks=4, window=1500), inputs)


def test_a_row_does_not_depend_on_its_batch():
    q, k, v = draw(1, 1200, B=3)
    used = int32(1200, 700, 3)
    together, _ = launch_decode(q, k, v, mask=Mask(), scale=SCALE, seqused_k=used)
    for row in range(3):
        part = [t[row : row + 1] for t in (q, k, v)]
        settings = {"mask": Mask(), "scale": SCALE, "seqused_k": used[row : row + 1]}
        assert torch.equal(launch_decode(*part, **settings)[0], together[row : row + 1])


def test_a_recorded_step_serves_later_lengths():
    q, k, v = draw(1, 1200)
    used = int32(5, 600)
    settings = {"mask": Mask(window=400, sinks=2), "scale": SCALE, "seqused_k": used}
    launch_decode(q, k, v, **settings)
    with capture() as graph:
        out, _ = launch_decode(q, k, v, **settings)
    used.copy_(int32(900, 1100))
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, launch_decode(q, k, v, **settings)[0])


def test_the_public_function_decodes_as_it_attends(assert_as_right):
    """One token after the other gives what all at once give."""
    q, k, v = draw(40, 40)
    mask = Mask(window=16, sinks=2, dense_from=30)
    with use_backend("triton"):
        whole = flash_attention(q, k, v, mask=mask, scale=SCALE)
        steps = [
            flash_attention(q[:, :t][:, -1:], k[:, :t], v[:, :t], mask=mask, scale=SCALE)
            for t in range(1, 41)
        ]
    assert_as_right(torch.cat(steps, 1), whole, q, k, v, mask=mask, scale=SCALE)


@pytest.mark.parametrize(
    ("Tq", "mask", "word"),
    [
        (17, Mask(), "at most 16"),
        (1, Mask(dilation=2), "dilation"),
        (1, Mask(pattern="local", block=4), "pattern"),
        (1, Mask(global_tokens=(0,)), "global_tokens"),
    ],
)
def test_what_decoding_cannot_do_is_named(Tq, mask, word):
    q, k, _ = draw(Tq, 40)
    assert word in decode_objection(q, k, mask)
    assert decode_objection(q[:, :1], k, Mask(window=3, sinks=1, dense_from=2)) is None
