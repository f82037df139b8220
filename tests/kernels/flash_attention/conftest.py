"""Attention against its float64 reference, as the tests of several files do it."""

import functools

import pytest
import torch

from bitnet_triton.kernels import Mask, exact_attention, flash_attention
from bitnet_triton.kernels.exact_attention.reference import select_reference
from bitnet_triton.kernels.flash_attention.pairs import Lengths
from bitnet_triton.kernels.flash_attention.reference import (
    attention_backward_reference,
    attention_reference,
)
from bitnet_triton.testing import RMS_LIMITS, assert_close


def draw(B, Tq, Tk, H, Hk, D, Dv, device):
    """Return q, k, v, and the gradients of out and lse."""
    shapes = [(B, Tq, H, D), (B, Tk, Hk, D), (B, Tk, Hk, Dv), (B, Tq, H, Dv), (B, H, Tq)]
    return [torch.randn(shape, device=device) for shape in shapes]


def run(attend, q, k, v, dout, dlse):
    """Return outputs and gradients; where no key is seen, lse has no gradient and counts as 0."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    out, lse = attend(q, k, v)
    seen = torch.isfinite(lse)
    torch.autograd.backward((out, lse), (dout, dlse.to(lse.dtype).masked_fill(~seen, 0.0)))
    grads = {"dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {"out": out, "lse": lse.masked_fill(~seen, 0.0)} | grads, seen


def run_steps(settings, q, k, v, dout, dlse):
    """Return what the algorithm of the paper gives in the dtype of the inputs, without kernels."""
    out, lse = attention_reference(q, k, v, **settings)
    seen = torch.isfinite(lse)
    dlse = dlse.to(lse.dtype).masked_fill(~seen, 0.0)
    dq, dk, dv = attention_backward_reference(dout, dlse, q, k, v, (out, lse), **settings)
    lse = lse.masked_fill(~seen, 0.0)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def largest_error(q, k, v, *, mask=None, scale=None, softcap=None, **lengths):
    """Return how far a right output in float32 may be from the exact one, added in any order.

    A sum of n terms rounds n times, each time by at most u = 2**-24 of the sum of magnitudes. The
    roundings are as good as independent: they add up to less than 6 sqrt(n) u of it, but once in
    1e8 times (doi:10.1137/18M1226312). That bounds the errors of scores, which a softcap makes no
    larger; through its weight an error of a score moves the average by as much of the distance
    between value and average; and the average is a sum of its own.
    """
    mask, scale = mask or Mask(), scale or q.shape[-1] ** -0.5
    # behind valid keys stands what must not be read
    q, k, v = (t.double().nan_to_num() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    visible = mask.visible_among(Lengths(q.shape[1], k.shape[1], **lengths), q.device)
    scores, sizes = (torch.einsum("bihd,bjhd->bhij", *t) for t in ((q, k), (q.abs(), k.abs())))
    scores = scores * scale if softcap is None else softcap * (scores * scale / softcap).tanh()
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
    out = torch.einsum("bhij,bjhd->bihd", weights, v)
    unit = 6 * 2**-24
    errors = weights * sizes * scale * unit * q.shape[-1] ** 0.5
    terms = unit * visible.sum(-1).max() ** 0.5 * weights
    moved = errors.sum(-1).transpose(1, 2)[..., None] * out.abs()
    return (moved + torch.einsum("bhij,bjhd->bihd", errors + terms, v.abs())).max().item()


@pytest.fixture(name="largest_error")
def _largest_error():
    """``largest_error``."""
    return largest_error


@pytest.fixture
def assert_as_right():
    """A function that compares two outputs of which each may have the errors of a right one."""

    def check(ours, theirs, q, k, v, **settings):
        limits = {
            "rms": 2 * RMS_LIMITS[torch.float32],
            "worst": 2 * largest_error(q, k, v, **settings),
        }
        assert_close("out", ours, theirs.double(), **limits)

    return check


def gradient_limit(eager, exact):
    """Return four times the worst error of the reference, instead of twice.

    Gradients are sums over rows, heads and tiles, in another order than those of a matrix product.
    Over 25 seeds their worst element reached 1.1 of the usual limit, at a relative RMS error of
    3.6e-7, a sixth of what is allowed.
    """
    step = torch.finfo(eager.dtype).eps * exact.abs().max()
    return 4 * torch.maximum((eager.double() - exact).abs().max(), 2 * step).item()


@pytest.fixture
def compare(device):
    """Return a function that compares all results of a call with those of the reference."""

    def check(
        mask, *, B=2, Tq=150, Tk=150, H=4, Hk=2, D=32, Dv=32, dtype=torch.float32, softcap=None,
        with_lse=True, worst=None, lattice=False, selection=None, **lengths,
    ):  # fmt: skip
        attend, chosen = flash_attention, {}
        if selection is not None:
            attend = functools.partial(exact_attention, **selection)
            chosen = {"select": functools.partial(select_reference, **selection)}
        inputs = [t.to(dtype) for t in draw(B, Tq, Tk, H, Hk, D, Dv, device)]
        inputs[4] *= with_lse
        if lattice:
            inputs[:2] = [t.mul(2).round().div(2) for t in inputs[:2]]
        settings = {"mask": mask, "scale": D**-0.5, "softcap": softcap, **lengths}
        ours, seen = run(lambda q, k, v: attend(q, k, v, return_lse=True, **settings), *inputs)
        settings |= chosen
        eager = run_steps(settings, *inputs)
        exact, expected_seen = run(
            lambda q, k, v: attention_reference(q, k, v, **settings),
            *[t.double() for t in inputs],
        )
        assert torch.equal(seen, expected_seen)
        for name, value in exact.items():
            # lse is float32 in every dtype
            rounded = {"eager": eager[name]} if ours[name].dtype == eager[name].dtype else {}
            limit = {} if worst is None else {"worst": worst}
            if name in ("dq", "dk", "dv") and dtype == torch.float32:
                # differences of products that nearly cancel, few of them where there is one token
                limit["rms"] = 2 * RMS_LIMITS[torch.float32]
                limit.setdefault("worst", gradient_limit(eager[name], value))
            assert_close(name, ours[name], value, **rounded, **limit)

    return check
