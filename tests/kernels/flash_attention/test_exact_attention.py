"""Attention to the largest scores of each row, against the float64 reference.

Queries and keys stand on a lattice: their products are exact in every dtype, and many are equal. So
no rounding decides what is selected, and the rule for equal scores does it often.
"""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitnet_triton import BackendUnavailableError, use_backend
from bitnet_triton.kernels import Mask, exact_attention, flash_attention
from bitnet_triton.kernels.exact_attention.reference import select_reference
from bitnet_triton.kernels.flash_attention.reference import attention_reference

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


CASES = {
    "top k": ({"top_k": 4}, Mask()),
    "threshold": ({"threshold": 0.3}, Mask()),
    "both": ({"top_k": 9, "threshold": 0.05}, Mask(window=70, sinks=3)),
    "both sides": ({"top_k": 5}, Mask(causal=False, window=20, window_right=9)),
    "dilation by head": ({"top_k": 4}, Mask(window=9, dilation=(1, 3, 2, 4), sinks=2)),
    "global tokens": ({"top_k": 6}, Mask(window=9, global_tokens=(0, 77, 140))),
    "dense rows": ({"top_k": 6}, Mask(window=9, sinks=3, dense_from=100)),
    "local": ({"top_k": 6, "threshold": 0.1}, Mask(pattern="local", block=37)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_largest_scores_are_attended_to(name, compare, backend):
    selection, mask = CASES[name]
    compare(mask, lattice=True, selection=selection)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_select_alike(dtype, compare, backend):
    compare(Mask(), dtype=dtype, D=64, Dv=64, lattice=True, selection={"top_k": 11})


def test_rows_select_from_the_keys_that_are_valid(compare, device, backend):
    lengths = {"leftpad_k": int32(0, 120), "seqused_k": int32(110, 150)}
    given = {name: t.to(device) for name, t in lengths.items()}
    compare(Mask(sinks=2, window=40), lattice=True, selection={"top_k": 5}, **given)


def test_bounded_scores_are_selected(compare, backend):
    compare(Mask(), softcap=1.5, lattice=True, selection={"top_k": 5})


@pytest.mark.parametrize("Tq", [1, 3])
def test_a_step_selects(Tq, compare, backend):
    settings = {"Tq": Tq, "Tk": 300, "H": 8, "Hk": 2, "lattice": True}
    compare(Mask(window=100), selection={"top_k": 5}, **settings)


@pytest.mark.parametrize("selection", [{"top_k": 150}, {"threshold": 1e-30}], ids=str)
def test_a_selection_of_everything_is_dense(selection, device, backend, assert_as_right):
    q, k, v = (torch.randn(1, 150, heads, 32, device=device) for heads in (4, 2, 2))
    ours = exact_attention(q, k, v, **selection)
    assert_as_right(ours, flash_attention(q, k, v), q, k, v)


def test_the_reference_selects_what_topk_selects():
    q, k, v = (torch.randn(1, 12, 1, 32) for _ in "qkv")
    scores = (q[0, :, 0] @ k[0, :, 0].t() * 32**-0.5).masked_fill(~Mask().visible(12)[0, 0], -1e9)
    out, _ = attention_reference(
        q, k, v, mask=Mask(), scale=32**-0.5, select=partial(select_reference, top_k=3)
    )
    for i in range(12):
        best, at = scores[i, : i + 1].topk(min(3, i + 1))
        torch.testing.assert_close(out[0, i, 0], best.softmax(0) @ v[0, at, 0])
    largest, _ = attention_reference(
        q, k, v, mask=Mask(), scale=1.0, select=partial(select_reference, threshold=1.0)
    )
    torch.testing.assert_close(largest, v[:, scores.argmax(-1)])


def test_of_equal_scores_the_earlier_keys_are_taken(device, backend):
    q, k = (torch.ones(1, 70, 1, 16, device=device) for _ in "qk")
    v = torch.arange(70.0, device=device).view(1, 70, 1, 1)
    out = exact_attention(q, k, v, top_k=3)
    expected = torch.tensor([0, 0.5] + 68 * [1.0], device=device)
    torch.testing.assert_close(out.flatten(), expected)
    # but all of them stand at the largest weight
    out = exact_attention(q, k, v, threshold=1.0)
    torch.testing.assert_close(out.flatten(), torch.arange(70.0, device=device) / 2)


def test_zeros_of_either_sign_are_equal(device, backend):
    q, k = (torch.zeros(1, 8, 1, 16, device=device) for _ in "qk")
    q[..., 0], k[:, ::2, :, 0] = 1.0, -0.0
    v = torch.arange(8.0, device=device).view(1, 8, 1, 1)
    out = exact_attention(q, k, v, top_k=2)
    torch.testing.assert_close(out.flatten()[1:], torch.full((7,), 0.5, device=device))


def test_packed_sequences_select_within_themselves(device, backend):
    q, k, v = (torch.randn(190, heads, 16, device=device) for heads in (4, 2, 2))
    q, k = q.mul(2).round(), k.mul(2).round()
    ends = [0, 130, 130, 190]
    cu = int32(*ends).to(device)
    mask, select = Mask(sinks=1), partial(select_reference, top_k=4)
    out = exact_attention(q, k, v, top_k=4, mask=mask, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for start, end in ((0, 130), (130, 190)):
        part = (t[None, start:end].double() for t in (q, k, v))
        expected, _ = attention_reference(*part, mask=mask, scale=0.25, select=select)
        torch.testing.assert_close(out[None, start:end].double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_patterns_of_several_bands_have_no_kernel(pattern, device, backend):
    q = torch.randn(1, 20, 2, 16, device=device)
    mask = Mask(pattern=pattern, block=4)
    with pytest.raises(BackendUnavailableError, match=f"under pattern '{pattern}'"):
        exact_attention(q, q, q, top_k=3, mask=mask)
    with use_backend("reference"):
        assert exact_attention(q, q, q, top_k=3, mask=mask).isfinite().all()


@pytest.mark.backends("triton")
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    selection=st.fixed_dictionaries(
        {"top_k": st.integers(1, 20)}, optional={"threshold": st.floats(1e-3, 1.0)}
    ),
    mask=st.builds(
        Mask,
        window=st.none() | st.integers(1, 40),
        sinks=st.integers(0, 30),
        dilation=st.integers(1, 3),
        dense_from=st.none() | st.integers(0, 100),
    ),
    sizes=st.tuples(st.integers(16, 90), st.integers(16, 90)),
)
def test_any_selection_matches_the_reference(selection, mask, sizes, compare, device, backend):
    Tq, Tk = sizes
    compare(mask, Tq=Tq, Tk=Tk, lattice=True, selection=selection)


def test_is_traced_as_one_op(device, backend):
    q, k, v = (torch.randn(1, 40, heads, 16).mul(2).round() for heads in (4, 2, 2))

    def attend(q, k, v):
        return exact_attention(q, k, v, top_k=3, threshold=0.1, mask=Mask(window=20))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    leaves = [[t.clone().requires_grad_() for t in (q, k, v)] for _ in "12"]
    ours, traced = attend(*leaves[0]), compiled(*leaves[1])
    assert torch.equal(ours, traced)
    for run in (ours, traced):
        run.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*leaves))


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ({}, ValueError, "`top_k`, `threshold`: expected at least one"),
        ({"top_k": 0}, ValueError, "`top_k`: expected at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "`top_k`: expected an integer, got float"),
        ({"threshold": 0.0}, ValueError, "`threshold`: expected more than 0, up to 1"),
        ({"threshold": 1.5}, ValueError, "`threshold`: expected more than 0, up to 1"),
        ({"top_k": 2, "mask": "causal"}, TypeError, "`mask`: expected a Mask"),
    ],
)
def test_bad_arguments_are_named(selection, error, message, device, backend):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(error, match=message):
        exact_attention(q, q, q, **selection)
