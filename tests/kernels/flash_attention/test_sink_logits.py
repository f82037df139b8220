"""``s_aux``: a logit of each head in the denominator of the softmax, against the dense formula."""

import pytest
import torch

from bitnet_triton.kernels import Mask, flash_attention
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.kernels.flash_attention.sink_logits import add_sink_logits
from bitnet_triton.testing import RMS_LIMITS, assert_close

H, Hk, D = 4, 2, 32
MASK = Mask(window=20, sinks=3)
SINKS = [-2.0, 0.0, 3.0, float("-inf")]


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def draw(*lead, Tk=None, device="cpu", dtype=torch.float32):
    """Return q, k, v and sinks, of which one is none."""
    keys = (*lead[:-1], lead[-1] if Tk is None else Tk)
    shapes = [(*lead, H, D), (*keys, Hk, D), (*keys, Hk, D)]
    tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    return [*tensors, torch.tensor(SINKS, device=device, dtype=dtype)]


def run(attend, inputs, dout, dlse):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out, lse = attend(*leaves)
    finite = torch.isfinite(lse)
    dlse = dlse.to(lse.dtype).masked_fill(~finite, 0.0)
    torch.autograd.backward((out, lse), (dout.to(out.dtype), dlse))
    grads = [t.grad for t in leaves]
    names = ("out", "lse", "dq", "dk", "dv", "ds_aux")
    return dict(zip(names, (out, lse.masked_fill(~finite, 0.0), *grads)))


@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((150, 150), {"mask": MASK}),
        ((70, 40), {"mask": Mask(), "softcap": 2.0}),  # the first rows see no key
        ((60, 60), {"mask": Mask(), "leftpad_k": int32(0, 9), "seqused_k": int32(31, 60)}),
        ((1, 90), {"mask": Mask(), "seqused_k": int32(90, 0)}),  # decode, one row without keys
        ((3, 1500), {"mask": Mask(window=1200, sinks=2)}),  # decode, the keys in shares
    ],
    ids=["window", "empty rows", "padding", "decode", "decode in shares"],
)  # fmt: skip
def test_matches_the_dense_formula(sizes, settings, dtype, device, backend):
    Tq, Tk = sizes
    inputs = draw(2, Tq, Tk=Tk, device=device, dtype=dtype)
    dout = torch.randn(2, Tq, H, D, device=device).to(dtype)
    dlse = torch.randn(2, H, Tq, device=device)
    settings = {"scale": 0.2, **settings}
    settings |= {n: t.to(device) for n, t in settings.items() if isinstance(t, torch.Tensor)}

    def reference(q, k, v, s_aux):
        return attention_reference(q, k, v, s_aux=s_aux, **settings)

    def ours(q, k, v, s_aux):
        return flash_attention(q, k, v, s_aux=s_aux, return_lse=True, **settings)

    found = run(ours, inputs, dout, dlse)
    eager = run(reference, inputs, dout, dlse)
    exact = run(reference, [t.double() for t in inputs], dout.double(), dlse.double())
    # a sum over rows that may nearly cancel: errors are a share of what is added up
    sizes = added_to_the_sinks(exact, inputs[3], dout, dlse)
    off = (found.pop("ds_aux").double() - exact.pop("ds_aux")).abs()
    assert (off <= 8 * torch.finfo(dtype).eps * sizes).all(), (off, sizes)
    for name, value in exact.items():
        limits = {"worst": 1e-5}  # lse is float32 in every dtype
        if name != "lse":
            # what the kernels give is rounded before the sinks and after, and so are gradients;
            # a weight is off by as many roundings as its score is large
            step = torch.finfo(dtype).eps * value.abs().max().item()
            worst = (eager[name].double() - value).abs().max().item()
            limits = {"rms": 2 * RMS_LIMITS[dtype], "worst": 16 * max(worst, step)}
        assert_close(name, found[name], value, **limits)


def added_to_the_sinks(exact, s_aux, dout, dlse):
    """Return the sum of the magnitudes that the gradient of each sink adds up, [H]."""
    weights = (s_aux.double()[:, None] - exact["lse"]).exp()
    products = (dout.double() * exact["out"]).abs().sum(-1).transpose(1, 2)
    return (weights * (products + dlse.double().abs())).sum((0, 2))


def test_without_a_key_the_sink_is_all_there_is(device):
    q, k, v, s_aux = (t.requires_grad_() for t in draw(1, 40, Tk=10, device=device))
    out, lse = flash_attention(q, k, v, s_aux=s_aux, return_lse=True)
    assert out[:, :30].eq(0).all()
    assert torch.equal(lse[0, :, :30], s_aux[:, None].expand(H, 30))
    torch.autograd.backward((out, lse[:, :3]), (torch.ones_like(out), torch.ones_like(lse[:, :3])))
    assert q.grad[:, :30].eq(0).all()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v, s_aux))
    assert s_aux.grad[3] == 0


def test_a_sink_of_minus_infinity_is_none(device):
    q, k, v, s_aux = draw(2, 50, device=device)
    plain = flash_attention(q, k, v, mask=MASK, return_lse=True)
    none = torch.full_like(s_aux, float("-inf"))
    for ours, expected in zip(
        flash_attention(q, k, v, mask=MASK, s_aux=none, return_lse=True), plain
    ):
        assert torch.equal(ours, expected)


@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
def test_packed_sequences_are_those_one_by_one(device, backend):
    q, k, v, s_aux = draw(90, device=device)
    ends = int32(0, 31, 31, 90).to(device)
    packed = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    dout, dlse = torch.randn(90, H, D, device=device), torch.randn(H, 90, device=device)
    whole = run(
        lambda q, k, v, s: flash_attention(q, k, v, s_aux=s, return_lse=True, **packed),
        (q, k, v, s_aux), dout, dlse,
    )  # fmt: skip
    parts = [
        run(
            lambda q, k, v, s: flash_attention(q, k, v, s_aux=s, return_lse=True),
            (*(t[None, i] for t in (q, k, v)), s_aux), dout[None, i], dlse[None, :, i],
        )
        for i in (slice(0, 31), slice(31, 90))
    ]  # fmt: skip
    for name in ("out", "dq", "dk", "dv"):
        together = torch.cat([part[name] for part in parts], 1)[0]
        torch.testing.assert_close(whole[name], together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole["ds_aux"], sum(part["ds_aux"] for part in parts))


def test_only_the_sink_may_want_a_gradient(device):
    q, k, v, s_aux = draw(2, 40, device=device)
    alone, together = s_aux.clone().requires_grad_(), s_aux.clone().requires_grad_()
    flash_attention(q, k, v, s_aux=alone).sum().backward()
    flash_attention(q.requires_grad_(), k, v, s_aux=together).sum().backward()
    assert torch.equal(alone.grad, together.grad)


def test_is_traced_without_a_graph_break():
    inputs = draw(2, 40)

    def attend(q, k, v, s_aux):
        return flash_attention(q, k, v, mask=MASK, s_aux=s_aux, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    dout, dlse = torch.randn(2, 40, H, D), torch.randn(2, H, 40)
    traced = run(compiled, inputs, dout, dlse)
    for name, value in run(attend, inputs, dout, dlse).items():
        torch.testing.assert_close(traced[name], value, atol=1e-6, rtol=1e-6, msg=name)


def test_gradients_pass_gradcheck():
    q, k, v = (torch.randn(1, 5, h, 3, dtype=torch.double).requires_grad_() for h in (2, 1, 1))
    s_aux = torch.randn(2, dtype=torch.double).requires_grad_()

    def dense(q, k, v, s_aux):
        return attention_reference(q, k, v, mask=MASK, scale=0.5, softcap=2.0, s_aux=s_aux)

    def rescaled(q, k, v, s_aux):
        settings = {"mask": MASK, "scale": 0.5, "softcap": 2.0}
        return add_sink_logits(*attention_reference(q, k, v, **settings), s_aux)

    assert torch.autograd.gradcheck(dense, (q, k, v, s_aux))
    assert torch.autograd.gradcheck(rescaled, (q, k, v, s_aux))
    for ours, expected in zip(rescaled(q, k, v, s_aux), dense(q, k, v, s_aux)):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("s_aux", "error", "message"),
    [
        ([0.0] * H, TypeError, "`s_aux`: expected a torch.Tensor, got list"),
        (torch.zeros(H, dtype=torch.double), TypeError, "`s_aux`: expected dtype"),
        (torch.zeros(3), ValueError, r"`s_aux`: expected \[H\] with H=4, got \[3\]"),
        (torch.zeros(H, device="meta"), ValueError, "`s_aux`: expected a tensor on cpu"),
    ],
)
def test_bad_sinks_are_named(s_aux, error, message):
    q, k, v, _ = draw(1, 4)
    with pytest.raises(error, match=message):
        flash_attention(q, k, v, s_aux=s_aux)
