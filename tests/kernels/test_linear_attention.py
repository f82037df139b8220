"""Linear attention against its recurrence in float64, token by token."""

import itertools
import random

import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from bitnet_triton.kernels import linear_attention
from bitnet_triton.kernels.linear_attention.reference import (
    chunked_reference,
    parallel_reference,
    recurrent_reference,
)
from bitnet_triton.kernels.linear_attention.reference_backward import (
    chunked_backward_reference,
)
from bitnet_triton.testing import RMS_LIMITS, assert_close

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]

# name -> has it beta, and the decay of what
FORMS = {
    "plain": (False, None),
    "decay": (False, "heads"),
    "gated": (False, "channels"),
    "delta": (True, None),
    "gated delta": (True, "heads"),
    "kda": (True, "channels"),
}
NAMES = ("q", "k", "v", "log_decay", "beta", "initial_state")


def draw(form, B=2, T=70, H=4, Hk=2, D=16, Dv=24, dtype=torch.float32, state=True):
    """Return inputs by name; keys have length 1, and a token forgets up to half."""
    with_beta, decay = FORMS[form]
    inputs = {
        "q": torch.randn(B, T, H, D),
        "k": normalize(torch.randn(B, T, Hk, D), dim=-1),
        "v": torch.randn(B, T, Hk, Dv),
    }
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    if decay is not None:
        shape = (B, T, Hk, D) if decay == "channels" else (B, T, Hk)
        inputs["log_decay"] = logsigmoid(torch.randn(shape) + 3)
    if with_beta:
        inputs["beta"] = torch.rand(B, T, Hk)
    if state:
        inputs["initial_state"] = torch.randn(B, Hk, D, Dv)
    return inputs


def draw_gradients(inputs):
    (B, T, H, D), (Hk, Dv) = inputs["q"].shape, inputs["v"].shape[2:]
    return torch.randn(B, T, H, Dv).to(inputs["q"].dtype), torch.randn(B, Hk, D, Dv)


def run(attend, inputs, dout, dstate, dtype=None):
    """Return outputs and all gradients; ``dtype`` in place of those of the inputs."""
    leaves = {
        name: (t if dtype is None else t.to(dtype)).detach().clone().requires_grad_()
        for name, t in inputs.items()
    }
    out, state = attend(leaves)
    grads = torch.autograd.grad(
        (out, state), leaves.values(), (dout.to(out.dtype), dstate.to(state.dtype))
    )
    results = {"out": out.detach(), "state": state.detach()}
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads)}


def ours(**settings):
    def attend(inputs):
        rest = {name: t for name, t in inputs.items() if name not in "qkv"}
        tensors = (inputs[name] for name in "qkv")
        return linear_attention(*tensors, **rest, **settings, return_state=True)

    return attend


def reference(form=recurrent_reference, scale=None, **settings):
    def attend(inputs):
        rest = {name: t for name, t in inputs.items() if name not in "qkv"}
        q = inputs["q"]
        used = q.shape[-1] ** -0.5 if scale is None else scale
        return form(q, inputs["k"], inputs["v"], **rest, scale=used, **settings)

    return attend


def part(inputs, at, state):
    """Return the tokens ``at``, that begin with ``state``."""
    own = {name: t[:, at] for name, t in inputs.items() if name != "initial_state"}
    return own if state is None else own | {"initial_state": state}


@pytest.mark.parametrize("form", FORMS)
def test_recurrent_chunked_and_parallel_are_the_same_function(form):
    for T in (1, 15, 16, 17, 70):
        inputs = draw(form, T=T, D=5, Dv=7, state=T != 17)
        gradients = draw_gradients(inputs)
        exact = run(reference(), inputs, *gradients, torch.float64)
        forms = {"chunked": {"chunk": 16}, "parallel": {}}
        for name, settings in forms.items():
            function = {"chunked": chunked_reference, "parallel": parallel_reference}[name]
            other = run(reference(function, **settings), inputs, *gradients, torch.float64)
            for key, value in exact.items():
                error = (other[key] - value).abs().max().item()
                assert error <= 1e-12 * max(1, value.abs().max().item()), (name, T, key)


@pytest.mark.parametrize("form", FORMS)
def test_split_anywhere_is_the_whole_in_float64(form):
    inputs = {name: t.double() for name, t in draw(form, T=50, D=5, Dv=7).items()}
    out, state = reference()(inputs)
    cut = random.randrange(1, 50)
    for function in (recurrent_reference, chunked_reference):
        first, between = reference(function)(part(inputs, slice(0, cut), inputs["initial_state"]))
        second, last = reference(function)(part(inputs, slice(cut, None), between))
        torch.testing.assert_close(torch.cat((first, second), 1), out, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(last, state, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_references_have_the_gradients_of_their_formulas(form):
    inputs = {name: t.double() for name, t in draw(form, B=1, T=5, D=2, Dv=3).items()}
    leaves = [t.requires_grad_() for t in inputs.values()]
    for function in (recurrent_reference, chunked_reference):
        attend = reference(function)
        assert torch.autograd.gradcheck(lambda *t: attend(dict(zip(inputs, t))), leaves)  # noqa: B023


@pytest.mark.parametrize("form", FORMS)
def test_the_gradients_by_formula_are_those_of_autograd(form):
    inputs = {name: t.double() for name, t in draw(form, T=37, D=5, Dv=7).items()}
    gradients = [t.double() for t in draw_gradients(inputs)]
    exact = run(reference(), inputs, *gradients)
    rest = {name: t for name, t in inputs.items() if name not in "qkv"}
    found = chunked_backward_reference(
        *gradients, *(inputs[n] for n in "qkv"), **rest, scale=5**-0.5, chunk=16
    )
    for name, grad in zip(NAMES, found):
        assert (grad is None) == (name not in inputs)
        if grad is not None:
            torch.testing.assert_close(grad, exact[f"d{name}"], atol=1e-12, rtol=1e-12)


def compare(got, exact, eager, inputs):
    """Compare results with those of the recurrence in float64, and in their own dtype."""
    # what decays and beta change is a difference of sums that nearly cancel
    largest = {"dlog_decay": (inputs["q"] * exact["dq"]).abs().sum(-1).max()}
    for name, value in exact.items():
        largest.setdefault(name, value.abs().max())
    for name, value in exact.items():
        if got[name].dtype != torch.float32:
            assert_close(name, got[name].cpu(), value, eager=eager[name])
            continue
        step = torch.finfo(torch.float32).eps * largest[name]
        error = (eager[name].double() - value).abs().max()
        # the gradient of a state takes away what the token's own key overwrites: less so
        times = {"dlog_decay": 16, "dbeta": 16, "dinitial_state": 8}.get(name, 4)
        worst = times * max(error, 2 * step).item()
        limits = {"worst": worst, "rms": times * RMS_LIMITS[torch.float32]}
        if name == "dlog_decay":
            assert (got[name].cpu() - value).abs().max() <= worst, name
        else:
            assert_close(name, got[name].cpu(), value, **limits)


def check(inputs, device, scale=None):
    gradients = draw_gradients(inputs)
    on_device = {name: t.to(device) for name, t in inputs.items()}
    got = run(ours(scale=scale), on_device, *(t.to(device) for t in gradients))
    compare(got, *expected(inputs, gradients, scale), inputs)


def expected(inputs, gradients, scale=None):
    exact = run(reference(scale=scale), inputs, *gradients, torch.float64)
    eager = run(reference(scale=scale), inputs, *gradients, torch.float32)
    dtypes = {"out": inputs["q"].dtype} | {f"d{n}": t.dtype for n, t in inputs.items()}
    return exact, {name: t.to(dtypes.get(name, torch.float32)) for name, t in eager.items()}


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# form, dtype, (B, T), (H, Hk), (D, Dv), is there a state: of each two most values meet
GRID = [
    ("plain", F32, (2, 31), (4, 2), (24, 40), True),
    ("plain", BF16, (1, 150), (6, 1), (128, 128), False),
    ("decay", F16, (1, 65), (1, 1), (64, 32), True),
    ("decay", F32, (2, 2), (6, 1), (256, 20), False),
    ("gated", BF16, (2, 1), (4, 2), (64, 32), True),
    ("gated", F32, (1, 150), (1, 1), (16, 16), False),
    ("delta", F16, (2, 31), (6, 1), (16, 16), False),
    ("delta", F32, (1, 64), (4, 2), (128, 128), True),
    ("gated delta", F32, (1, 150), (4, 2), (64, 32), True),
    ("gated delta", BF16, (2, 64), (1, 1), (256, 20), False),
    ("gated delta", F16, (2, 1), (4, 2), (128, 128), False),
    ("kda", F32, (2, 65), (6, 1), (24, 40), True),
    ("kda", F16, (1, 150), (4, 2), (64, 32), False),
    ("kda", BF16, (2, 2), (1, 1), (128, 128), True),
]


@pytest.mark.parametrize("case", range(len(GRID)))
def test_results_and_gradients_match_the_recurrence(case, device, backend):
    form, dtype, (B, T), (H, Hk), (D, Dv), state = GRID[case]
    inputs = draw(form, B, T, H, Hk, D, Dv, dtype, state=state)
    inputs["k"] = inputs["k"] * 0.9  # of length below 1 when rounded, too
    check(inputs, device)


def test_a_scale_may_be_negative(device, backend):
    check(draw("gated delta"), device, scale=-0.3)


@pytest.mark.parametrize("form", ["gated", "gated delta", "kda"])
def test_decays_of_any_strength_are_safe(form, device, backend):
    """Of a token that forgets everything nothing overflows, and nothing before it is seen."""
    inputs = draw(form, T=100)
    strong = torch.rand(inputs["log_decay"].shape) < 0.3
    inputs["log_decay"] = torch.where(strong, -torch.rand(strong.shape) * 300, inputs["log_decay"])
    inputs["log_decay"][:, 40] = -1000.0
    gradients = draw_gradients(inputs)
    on_device = {name: t.to(device) for name, t in inputs.items()}
    got = run(ours(), on_device, *(t.to(device) for t in gradients))
    exact, _ = expected(inputs, gradients)
    for name, value in exact.items():
        # sums of decays, up to some 5000, are good to 5e-4: so are their exponentials
        torch.testing.assert_close(got[name].cpu().double(), value, atol=3e-3, rtol=3e-3)
    later = ours()(part(on_device, slice(40, None), None))
    torch.testing.assert_close(got["out"][:, 40:], later[0], atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("form", ["plain", "kda"])
def test_split_anywhere_is_the_whole(form, device, backend):
    inputs = {name: t.to(device) for name, t in draw(form, T=150).items()}
    out, state = ours()(inputs)
    cut = random.choice((1, 64, 149, random.randrange(1, 150)))
    first, between = ours()(part(inputs, slice(0, cut), inputs["initial_state"]))
    second, last = ours()(part(inputs, slice(cut, None), between))
    torch.testing.assert_close(torch.cat((first, second), 1), out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last, state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["decay", "gated delta", "kda"])
def test_packed_sequences_stay_apart(form, device, backend):
    ends = [0, 1, 1, 2, 66, 131]
    inputs = draw(form, B=1, T=131)
    inputs["initial_state"] = torch.randn(5, 2, 16, 24)
    dout, dstate = torch.randn(131, 4, 24), torch.randn(5, 2, 16, 24)
    packed = {n: t if n == "initial_state" else t[0] for n, t in inputs.items()}
    packed = {name: t.to(device) for name, t in packed.items()}
    starts = torch.tensor(ends, dtype=torch.int32, device=device)
    got = run(ours(cu_seqlens=starts), packed, dout.to(device), dstate.to(device))
    for b, (start, end) in enumerate(itertools.pairwise(ends)):
        own = {
            n: t[b : b + 1] if n == "initial_state" else t[:, start:end] for n, t in inputs.items()
        }
        found = {n: t[None, start:end] for n, t in got.items()}
        found |= {n: got[n][b : b + 1] for n in ("state", "dinitial_state")}
        if start == end:
            torch.testing.assert_close(found["state"].cpu(), own["initial_state"])
            torch.testing.assert_close(found["dinitial_state"].cpu(), dstate[b : b + 1])
            continue
        compare(found, *expected(own, (dout[None, start:end], dstate[b : b + 1])), own)


def test_tokens_that_write_nothing_leave_the_state_as_it_is(device, backend):
    """Padding: with k, beta and log_decay 0, whatever v holds."""
    inputs = {name: t.to(device) for name, t in draw("gated delta", T=100).items()}
    for name in ("k", "beta", "log_decay"):
        inputs[name][1, :37] = 0
    out, state = ours()(inputs)
    alone = {name: t[1:] for name, t in inputs.items()}
    out_alone, state_alone = ours()(part(alone, slice(37, None), alone["initial_state"]))
    torch.testing.assert_close(out[1:, 37:], out_alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state[1:], state_alone, atol=1e-5, rtol=1e-4)
    first, same = ours()(part(inputs, slice(0, 37), inputs["initial_state"]))
    assert first.isfinite().all()
    assert torch.equal(same[1], inputs["initial_state"][1])


@pytest.mark.parametrize("form", ["plain", "decay", "gated"])
def test_normalised_weights_sum_to_one(form, device, backend):
    inputs = draw(form, Dv=5, state=False)
    for name in "qk":
        inputs[name] = inputs[name].relu()
    inputs["q"][0, 3] = 0  # weighs nothing
    inputs["initial_state"] = torch.rand(2, 2, 16, 6)
    dout, dstate = torch.randn(2, 70, 4, 5), torch.randn(2, 2, 16, 6)
    on_device = {name: t.to(device) for name, t in inputs.items()}
    got = run(ours(normalize=True), on_device, dout.to(device), dstate.to(device))
    exact = run(reference(normalize=True), inputs, dout, dstate, torch.float64)
    eager = run(reference(normalize=True), inputs, dout, dstate, torch.float32)
    compare(got, exact, eager, inputs)
    assert not got["out"][0, 3].any()
    # every channel of a key counts: a query that weighs anything weighs its own token
    ones = on_device | {"v": torch.ones_like(on_device["v"]), "initial_state": None}
    ones["k"] = on_device["k"] + 0.01
    q = on_device["q"].sum(-1)
    out, _ = ours(normalize=True)(ones)
    torch.testing.assert_close(out[q > 0], torch.ones_like(out[q > 0]))


def test_sums_over_many_tokens_do_not_overflow_float16(device, backend):
    T = 3000
    q, k = (torch.full((1, T, 1, 16), 4.0, dtype=torch.float16, device=device) for _ in range(2))
    v = torch.randn(1, T, 1, 16, device=device).half()
    out, state = linear_attention(q, k, v, normalize=True, return_state=True)
    mean = v.double().cumsum(1) / torch.arange(1, T + 1, device=device)[:, None, None]
    torch.testing.assert_close(out.double(), mean, atol=1e-3, rtol=2e-3)
    assert (state[..., -1] == 4.0 * T).all()


def test_without_memory_a_token_reads_only_itself(device, backend):
    inputs = {name: t.to(device) for name, t in draw("decay").items()}
    inputs["log_decay"][:] = float("-inf")
    q, k, v = (inputs[name] for name in "qkv")
    weight = (q * k.repeat_interleave(2, 2)).sum(-1, keepdim=True) / 4
    out, _ = ours()(inputs)
    torch.testing.assert_close(out, weight * v.repeat_interleave(2, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("T", [1, 100])
def test_the_gated_delta_rule_is_that_of_transformers(T, device, backend):
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    inputs = {name: t.to(device) for name, t in draw("gated delta", T=T, H=2).items()}
    inputs["q"] = normalize(inputs["q"], dim=-1)
    out, state = ours()(inputs)
    q, k, v, log_decay, beta, initial = inputs.values()
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        settings = {"initial_state": initial, "output_final_state": True}
        theirs, last = getattr(qwen, name)(3 * q, k, v, log_decay, beta, **settings)
        torch.testing.assert_close(3 * out, theirs, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-4)
        theirs, _ = getattr(qwen, name)(
            5 * q, 7 * k, v, log_decay, beta, use_qk_l2norm_in_kernel=True, **settings
        )
        torch.testing.assert_close(out, theirs, atol=1e-4, rtol=1e-3)


def test_strided_inputs_are_read_as_they_lie(device, backend):
    inputs = {name: t.to(device) for name, t in draw("gated delta", T=40).items()}
    dout, dstate = (t.to(device) for t in draw_gradients(inputs))
    plain = run(ours(), inputs, dout, dstate)
    views = {
        name: t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 4 else t
        for name, t in inputs.items()
    }
    views["k"] = torch.stack((views["k"], views["k"]), -1)[..., 0]  # no dimension is contiguous
    views["log_decay"] = inputs["log_decay"][:1, :, :1].expand(2, 40, 2)
    views["beta"] = torch.stack((inputs["beta"], inputs["beta"]), -1)[..., 0]
    plain = run(ours(), inputs | {"log_decay": views["log_decay"].contiguous()}, dout, dstate)
    leaves = [t.detach().requires_grad_() for t in views.values()]
    out, state = ours()(dict(zip(views, leaves)))
    other = torch.autograd.grad(
        (out, state), leaves, (dout.transpose(0, 1).contiguous().transpose(0, 1), dstate)
    )
    torch.testing.assert_close(out, plain["out"])
    for name, grad in zip(views, other):
        torch.testing.assert_close(grad, plain[f"d{name}"])


@pytest.mark.parametrize("form", ["plain", "kda"])
def test_a_compiled_call_gives_the_same(form, device, backend):
    inputs = {name: t.to(device) for name, t in draw(form, T=40).items()}
    gradients = [t.to(device) for t in draw_gradients(inputs)]
    plain = run(ours(), inputs, *gradients)
    compiled = torch.compile(ours(), fullgraph=True, backend="aot_eager")
    for name, t in run(compiled, inputs, *gradients).items():
        assert torch.equal(t, plain[name]), name


def test_a_second_backward_is_bitwise_equal(device, backend):
    inputs = {name: t.to(device).requires_grad_() for name, t in draw("kda", T=150).items()}
    out, state = ours()(inputs)
    total = out.sum() + state.square().sum()
    first = torch.autograd.grad(total, inputs.values(), retain_graph=True)
    second = torch.autograd.grad(total, inputs.values())
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_one_tensor_may_be_key_and_value(device, backend):
    q, k = (torch.randn(1, 20, heads, 16, device=device) for heads in (4, 2))
    for call in (linear_attention, torch.compile(linear_attention, backend="aot_eager")):
        torch.testing.assert_close(call(q, k, k), linear_attention(q, k, k.clone()))


def test_no_tokens_give_no_output_and_the_state_that_came_in(device, backend):
    inputs = {n: t.to(device).requires_grad_() for n, t in draw("gated delta", T=0).items()}
    out, state = ours()(inputs)
    assert out.shape == (2, 0, 4, 24)
    assert torch.equal(state, inputs["initial_state"])
    state.sum().backward()
    assert (inputs["initial_state"].grad == 1).all()


GIVEN = draw("gated delta", T=5)
PACKED = {n: t if n == "initial_state" else t[0] for n, t in GIVEN.items()} | {
    "initial_state": GIVEN["initial_state"][:1],
    "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
}
WRONG = {
    "dtype of k": (GIVEN, {"k": GIVEN["k"].half()}, TypeError, "`k`: expected dtype float32"),
    "heads": (GIVEN, {"q": GIVEN["q"][:, :, :3]}, ValueError, "`k`: expected heads that divide"),
    "tokens": (
        GIVEN, {"q": GIVEN["q"][:, :4]}, ValueError,
        r"`k`: expected \[B T Hk D\] with B=2, T=4, got \[2, 5, 2, 16\]",
    ),
    "no tensor": (GIVEN, {"beta": 1.0}, TypeError, "`beta`: expected a torch.Tensor, got float"),
    "dtype of decay": (
        GIVEN, {"log_decay": GIVEN["log_decay"].double()}, TypeError,
        "`log_decay`: expected dtype float32 or float16 or bfloat16, got float64",
    ),
    "decay": (
        GIVEN, {"log_decay": GIVEN["log_decay"][..., :1]}, ValueError,
        r"`log_decay`: expected \[B T Hk\] with B=2, T=5, Hk=2, got \[2, 5, 1\]",
    ),
    "decay of channels": (
        GIVEN, {"log_decay": GIVEN["v"]}, ValueError,
        r"`log_decay`: expected \[B T Hk D\] with B=2, T=5, Hk=2, D=16, got \[2, 5, 2, 24\]",
    ),
    "beta": (
        GIVEN, {"beta": GIVEN["beta"][:1]}, ValueError,
        r"`beta`: expected \[B T Hk\] with B=2, T=5, Hk=2, got \[1, 5, 2\]",
    ),
    "dtype of state": (
        GIVEN, {"initial_state": GIVEN["initial_state"].half()}, TypeError,
        "`initial_state`: expected dtype float32, got float16",
    ),
    "state": (
        GIVEN, {"initial_state": GIVEN["initial_state"][:, :1]}, ValueError,
        r"`initial_state`: expected \[B Hk D Dv\] with B=2, Hk=2, D=16, Dv=24, got \[2, 1, 16",
    ),
    "state with a sum of keys": (
        GIVEN, {"beta": None, "normalize": True}, ValueError,
        r"`initial_state`: expected \[B Hk D Dv\+1\] with .*, Dv\+1=25, got \[2, 2, 16, 24\]",
    ),
    "normalised delta rule": (
        GIVEN, {"normalize": True}, ValueError,
        "`normalize`: expected no `beta`, whose weights have any sign",
    ),
    "device": (
        GIVEN, {"beta": GIVEN["beta"].to("meta")}, ValueError,
        "`beta`: expected a tensor on cpu, got one on meta",
    ),
    "dtype of starts": (
        PACKED, {"cu_seqlens": torch.tensor([0, 5])}, TypeError,
        "`cu_seqlens`: expected dtype int32, got int64",
    ),
    "no starts": (
        PACKED, {"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError,
        r"`cu_seqlens`: expected \[B\+1\] with B at least 0, got \[0\]",
    ),
    "packed state": (
        PACKED, {"initial_state": GIVEN["initial_state"]}, ValueError,
        r"`initial_state`: expected \[B Hk D Dv\] with B=1",
    ),
    "packed keys": (
        PACKED, {"k": GIVEN["k"]}, ValueError, r"`k`: expected \[T Hk D\] with D=16, got \[2, 5",
    ),
}  # fmt: skip


@pytest.mark.backends("reference")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    given, change, error, message = WRONG[name]
    given = given | change
    with pytest.raises(error, match=message):
        linear_attention(**given)
