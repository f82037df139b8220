"""The public functions: layouts, errors, gradients, tracing, and what other libraries compute."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import eager_attention_forward

from bitnet_triton.kernels import Mask, flash_attention, merge_attention
from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.launchers import ATTENTION_FWD
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.testing import assert_close

MASK = Mask(window=20, sinks=3)


def int32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def draw(*lead, H=4, Hk=2, D=32, Dv=32, Tk=None, device="cpu"):
    """Return q, k, v with leading dimensions ``lead``, of which the last is tokens."""
    keys = (*lead[:-1], lead[-1] if Tk is None else Tk)
    shapes = [(*lead, H, D), (*keys, Hk, D), (*keys, Hk, Dv)]
    return [torch.randn(shape, device=device) for shape in shapes]


def gradients(attend, inputs, dout):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(attend(*leaves), leaves, dout)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
def test_sdpa_gives_the_same(causal, device, backend, assert_as_right):
    q, k, v = draw(2, 150, device=device)
    out = flash_attention(q, k, v, mask=Mask(causal=causal))
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True)
    assert_as_right(out, theirs.transpose(1, 2), q, k, v, mask=Mask(causal=causal))


@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
def test_transformers_eager_attention_gives_the_same(device, backend, assert_as_right):
    q, k, v = draw(2, 150, device=device)
    bias = torch.zeros(1, 1, 150, 150, device=device)
    bias = bias.masked_fill(~MASK.visible(150, device=device), float("-inf"))
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    theirs, _ = eager_attention_forward(module, *heads, bias, scaling=0.2)
    out = flash_attention(q, k, v, mask=MASK, scale=0.2)
    assert_as_right(out, theirs, q, k, v, mask=MASK, scale=0.2)


@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
@pytest.mark.parametrize(
    "mask",
    [
        Mask(window=20, sinks=3),
        Mask(window=9, dilation=3, dense_from=int32(50, 0, 5, 9)),
        Mask(causal=False, window=9, window_right=4, global_tokens=(0, 40)),
    ],
    ids=str,
)
def test_packed_sequences_are_those_one_by_one(mask, device, backend):
    lengths = [(130, 130), (0, 7), (5, 0), (40, 60)]
    ends_q, ends_k = (int32(0, *t).cumsum(0, dtype=torch.int32) for t in zip(*lengths))
    q = torch.randn(175, 4, 32, device=device)
    k, v = (torch.randn(197, 2, 32, device=device) for _ in "kv")
    dout = torch.randn_like(q)
    packed = {"cu_seqlens_q": ends_q.to(device), "cu_seqlens_k": ends_k.to(device)}
    out, lse = flash_attention(q, k, v, mask=mask, return_lse=True, **packed)
    grads = gradients(lambda *t: flash_attention(*t, mask=mask, **packed), (q, k, v), dout)

    for b in range(4):
        i, j = (slice(int(ends[b]), int(ends[b + 1])) for ends in (ends_q, ends_k))
        parts = (q[None, i], k[None, j], v[None, j])
        alone = mask.of_row(b, j.start, j.stop)
        settings = {"mask": alone, "scale": 32**-0.5}
        exact, exact_lse = attention_reference(*(t.double() for t in parts), **settings)
        assert_close("out", out[None, i], exact)
        torch.testing.assert_close(lse[None, :, i].double(), exact_lse, atol=5e-6, rtol=0)
        wide = [t.double() for t in parts]
        expected = gradients(
            lambda *t: attention_reference(*t, **settings)[0],  # noqa: B023 - called at once
            wide, dout[None, i].double(),
        )  # fmt: skip
        for name, grad, want, rows in zip(("dq", "dk", "dv"), grads, expected, (i, j, j)):
            torch.testing.assert_close(
                grad[None, rows].double(), want, atol=1e-5, rtol=1e-5, msg=f"{name} of {b}"
            )


@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
@pytest.mark.parametrize("mask", [MASK, Mask(window=9, dilation=3, dense_from=60)], ids=str)
def test_empty_sequences_change_nothing(mask, device, backend):
    q, k, v = draw(175, device=device)
    ends = torch.tensor([0, 130, 131, 175], dtype=torch.int32)
    # as many as there are tokens, as torch.compile describes a batch
    filled = torch.cat([ends[:1].repeat(5), ends[1:2].repeat(9), ends[2:3], ends[3:].repeat(161)])

    def run(cu):
        both = {"cu_seqlens_q": cu.to(device), "cu_seqlens_k": cu.to(device)}
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = flash_attention(*leaves, mask=mask, **both)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for ours, expected in zip(run(filled), run(ends)):
        assert torch.equal(ours, expected)


def test_tokens_of_no_sequence_give_zeros(device):
    q, k, v = draw(5, device=device)
    none = int32(0, device=device)
    out = flash_attention(q, k, v, cu_seqlens_q=none, cu_seqlens_k=none)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
def test_strided_and_empty_inputs(device, backend):
    q, k, v = draw(2, 40, device=device)
    expected = flash_attention(q, k, v, mask=MASK)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(flash_attention(*strided, mask=MASK), expected)
    spread = [torch.stack((t, t), -1)[..., 0] for t in (q, k, v)]
    assert torch.equal(flash_attention(*spread, mask=MASK), expected)
    out, lse = flash_attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert out.eq(0).all()
    assert lse.eq(float("-inf")).all()
    assert flash_attention(q[:, :0], k, v).shape == (2, 0, 4, 32)
    assert flash_attention(q[:0], k[:0], v[:0]).shape == (0, 40, 4, 32)


@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
def test_huge_scores_and_constant_rows(device, backend):
    q, k, v = draw(1, 40, device=device)
    q = q * 1e4
    q[0, 3] = 0
    assert_close(
        "out",
        flash_attention(q, k, v),
        attention_reference(q.double(), k.double(), v.double(), mask=Mask(), scale=32**-0.5)[0],
        # scores of 1e4 are rounded to 1e-3: where two are that close, weights are off by as much
        rms=2e-3, worst=2e-2,
    )  # fmt: skip


@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
def test_the_backward_runs_twice_and_gives_the_same_bits(device, backend):
    q, k, v = (t.requires_grad_() for t in draw(2, 150, device=device))
    mask = Mask(window=20, sinks=3, dense_from=100)
    out, lse = flash_attention(q, k, v, mask=mask, return_lse=True)
    loss = out.square().sum() + lse.sum()
    once, again = (torch.autograd.grad(loss, (q, k, v), retain_graph=True) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.backends("triton", "reference")
@pytest.mark.usefixtures("forced_backend")
def test_a_gradient_of_lse_alone(device, backend):
    q, k, v = draw(1, 40, device=device)
    dlse = torch.randn(1, 4, 40, device=device)
    dq, dk, dv = gradients(
        lambda *t: flash_attention(*t, mask=MASK, return_lse=True)[1], (q, k, v), dlse
    )
    exact = gradients(
        lambda q, k, v: attention_reference(q, k, v, mask=MASK, scale=32**-0.5)[1] + 0 * v.sum(),
        [t.double() for t in (q, k, v)], dlse.double(),
    )  # fmt: skip
    torch.testing.assert_close(dq.double(), exact[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(dk.double(), exact[1], atol=1e-6, rtol=1e-5)
    assert not dv.any()


def test_rows_without_keys_have_no_gradient(device):
    q, k, v = (t.requires_grad_() for t in draw(1, 40, Tk=10, device=device))
    out, lse = flash_attention(q, k, v, return_lse=True)
    assert lse[:, :, :30].eq(float("-inf")).all()
    # what comes in for their lse may be infinite: it must not come through
    torch.autograd.backward((out, lse), (torch.ones_like(out), torch.where(lse > -99, 1.0, lse)))
    assert q.grad[:, :30].eq(0).all()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_is_traced_as_one_op():
    inputs = draw(2, 40)
    mask = Mask(window=9, global_tokens=torch.rand(2, 40) > 0.9, dilation=(1, 2, 1, 2))

    def attend(q, k, v):
        return flash_attention(q, k, v, mask=mask)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), attend(*inputs))
    dout = torch.randn(2, 40, 4, 32)
    for ours, traced in zip(gradients(attend, inputs, dout), gradients(compiled, inputs, dout)):
        assert torch.equal(ours, traced)


def test_is_traced_where_tensors_stand_for_two_arguments():
    q, k, _ = (t[0].requires_grad_() for t in draw(1, 40))
    ends = int32(0, 15, 40)

    def attend(q, k, ends, start):
        packed = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        return flash_attention(q, k, k, mask=Mask(window=9, dense_from=start), **packed)

    arguments = (q, k, ends, int32(9, 20))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(compiled, attend(*arguments))
    compiled.sum().backward()


def test_the_reference_passes_gradcheck():
    q, k, v = (t.double().requires_grad_() for t in draw(1, 5, H=2, Hk=1, D=3, Dv=2))

    def attend(q, k, v):
        return attention_reference(q, k, v, mask=MASK, scale=0.5, softcap=2.0)

    assert torch.autograd.gradcheck(attend, (q, k, v))


@pytest.mark.parametrize("packed", [False, True])
def test_parts_merge_into_the_whole(packed, device, assert_as_right):
    """Keys in three parts; merged forward and backward they give what all of them give."""
    lead = (150,) if packed else (2, 150)
    q, k, v = draw(*lead, device=device)
    dout = torch.randn_like(q)
    axis = len(lead) - 1

    def attend(q, k, v):
        settings = {"mask": Mask(causal=False), "return_lse": True}
        if packed:
            settings["cu_seqlens_q"] = int32(0, q.shape[0], device=device)
            settings["cu_seqlens_k"] = int32(0, k.shape[0], device=device)
        return flash_attention(q, k, v, **settings)

    def merged(q, k, v):
        pairs = zip(k.split([70, 1, 79], axis), v.split([70, 1, 79], axis))
        return merge_attention(*zip(*(attend(q, *pair) for pair in pairs)))

    (ours, lse), (whole, whole_lse) = merged(q, k, v), attend(q, k, v)
    batch = [t[None] if packed else t for t in (ours, whole, q, k, v)]
    assert_as_right(*batch, mask=Mask(causal=False))
    torch.testing.assert_close(lse, whole_lse, atol=2e-6, rtol=2e-6)
    ours = gradients(lambda *t: merged(*t)[0], (q, k, v), dout)
    for grad, whole in zip(ours, gradients(lambda *t: attend(*t)[0], (q, k, v), dout)):
        torch.testing.assert_close(grad, whole, atol=5e-6, rtol=2e-5)


def test_merging_queries_that_saw_nothing():
    out, lse = torch.zeros(1, 2, 1, 4), torch.full((1, 1, 2), float("-inf"))
    lse[0, 0, 0] = 0.5
    out.requires_grad_()
    merged, merged_lse = merge_attention([out, out], [lse, lse.clone()])
    assert merged.eq(0).all()
    assert merged_lse[0, 0, 1] == float("-inf")
    torch.testing.assert_close(merged_lse[0, 0, 0], torch.tensor(0.5).add(2).sub(2) + 0.6931472)
    merged.sum().backward()
    assert torch.isfinite(out.grad).all()


def test_parts_that_do_not_fit_are_named():
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="`outs`: expected as many parts"):
        merge_attention([out], [])
    with pytest.raises(ValueError, match="`outs`: expected equal shapes"):
        merge_attention([out, out[:, :1]], [lse, lse])
    with pytest.raises(ValueError, match=r"`lses`: expected \[1, 3, 2\], got \[1, 2, 3\]"):
        merge_attention([out], [lse.transpose(1, 2)])


Q, K, V = torch.ones(2, 5, 4, 8), torch.ones(2, 6, 2, 8), torch.ones(2, 6, 2, 8)
ENDS = int32(0, 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "`q`: expected a torch.Tensor, got list"),
        ({"q": Q.double()}, TypeError, "`q`: expected dtype"),
        ({"q": Q[0]}, ValueError, r"`q`: expected \[B Tq H D\]"),
        ({"k": K.half()}, TypeError, "`k`: expected dtype float32"),
        ({"k": K[:1]}, ValueError, r"`k`: expected \[B Tk Hk D\] with B=2, D=8"),
        ({"k": K[..., :4]}, ValueError, "`k`: .* D=8"),
        ({"v": V[:, :3]}, ValueError, r"`v`: expected .* Tk=6, Hk=2"),
        ({"q": Q[:, :, :3]}, ValueError, "`k`: expected heads that divide the 3 of `q`, got 2"),
        ({"v": V.to("meta")}, ValueError, "`v`: expected a tensor on cpu"),
        ({"mask": "causal"}, TypeError, "`mask`: expected a Mask, got str"),
        ({"mask": Mask(dilation=(1, 2))}, ValueError, "`mask`: expected one dilation or 4, got 2"),
        (
            {"mask": Mask(global_tokens=torch.ones(2, 5, dtype=torch.bool))},
            ValueError, r"`mask.global_tokens`: expected \[B Tk\]",
        ),
        ({"mask": Mask(dense_from=int32(1))}, ValueError, r"`mask.dense_from`: expected \[B\]"),
        ({"softcap": 0.0}, ValueError, "`softcap`: expected a positive number"),
        ({"cu_seqlens_q": ENDS}, ValueError, "`q`: expected"),
        ({"q": Q[0], "k": K[0], "v": V[0], "cu_seqlens_q": ENDS}, ValueError, "both or neither"),
        (
            {"q": Q[0], "k": K[0], "v": V[0], "cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS,
             "leftpad_k": int32(0)},
            ValueError, "`leftpad_k`: packed sequences",
        ),
        (
            {"q": Q[0], "k": K[0], "v": V[0], "cu_seqlens_q": ENDS.long(), "cu_seqlens_k": ENDS},
            TypeError, "`cu_seqlens_q`: expected dtype int32",
        ),
        ({"leftpad_k": int32(1)}, ValueError, r"`leftpad_k`: expected \[B\] with B=2, got \[1\]"),
        ({"seqused_k": torch.ones(2)}, TypeError, "`seqused_k`: expected dtype int32"),
        ({"seqused_q": int32(1, 1, 1)}, ValueError, "`seqused_q`: expected"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"q": Q, "k": K, "v": V} | changes
    with pytest.raises(error, match=message):
        flash_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("where", "dtype", "D", "largest"),
    [
        ("cpu", torch.float32, 257, 256),
        ("meta", torch.bfloat16, 257, 256),
        ("meta", torch.float32, 129, 128),
    ],
)
def test_heads_that_no_program_holds_are_left_to_the_reference(where, dtype, D, largest):
    supports = ATTENTION_FWD["triton"].supports
    q, call = torch.empty(1, 4, 1, D, device=where, dtype=dtype), Call(Mask(), 1.0)
    assert supports(q, q, call) == f"heads have at most {largest} values"
    fits = q[..., :largest]
    assert supports(fits, fits, call) is None
