"""Attention inside of buckets against the paper's formula in float64, and what it promises."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitnet_triton.kernels import bucket_attention, hash_buckets, lsh_attention
from bitnet_triton.kernels.lsh_attention.arguments import Directions
from bitnet_triton.kernels.lsh_attention.buckets import bucket_factors, rotation_rows
from bitnet_triton.kernels.lsh_attention.reference import (
    lsh_attention_reference,
    unit_keys,
    visible_pairs,
)
from bitnet_triton.kernels.lsh_attention.step import bucket_attention_last
from bitnet_triton.testing import RMS_LIMITS, assert_close

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


def draw(B, T, H, D, Dv, dtype=torch.float32):
    """Return qk, v and the gradient of the result."""
    return [torch.randn(B, T, H, size, dtype=dtype) for size in (D, Dv, Dv)]


def draw_numbers(B, T, H, R, buckets):
    return torch.randint(0, buckets, (B, T, H, R), dtype=torch.int32)


def run(attend, qk, v, dout):
    qk, v = (t.detach().clone().requires_grad_() for t in (qk, v))
    out = attend(qk, v)
    out.backward(dout.to(out.dtype))
    return {"out": out.detach(), "dqk": qk.grad, "dv": v.grad}


def check(inputs, numbers, device, *, window, **settings):
    """Compare all results with those of the formula in float64, and in the dtype of the inputs."""
    places = {"window": window, "pattern": "window", "causal": True} | settings
    scale = places.pop("scale", inputs[0].shape[-1] ** -0.5)
    if places.get("leftpad") is not None:
        settings["leftpad"] = places["leftpad"].to(device)
    visible = visible_pairs(numbers, **places)
    formula = functools.partial(lsh_attention_reference, visible=visible, scale=scale)
    exact = run(formula, *(t.double() for t in inputs))
    eager = run(formula, *inputs)
    attend = functools.partial(
        bucket_attention, numbers=numbers.to(device), window=window, **settings
    )
    ours = run(attend, *(t.to(device) for t in inputs))
    for name, value in exact.items():
        limits = {"eager": eager[name]}
        if inputs[0].dtype == torch.float32 and name != "out":
            # differences of products that nearly cancel, in another order
            step = torch.finfo(torch.float32).eps * value.abs().max()
            error = (eager[name].double() - value).abs().max()
            limits |= {"rms": 2 * RMS_LIMITS[torch.float32]}
            limits |= {"worst": 7 * max(error, 2 * step).item()}
        assert_close(name, ours[name].cpu(), value, **limits)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# pairwise: (B, T, H), (D, Dv), rounds, buckets, window, pattern, causal, dtype
GRID = [
    ((2, 70, 3), (32, 32), 3, 4, 9, "window", True, F32),
    ((1, 131, 2), (32, 48), 2, 8, 16, "chunk", True, F32),
    ((1, 200, 2), (64, 64), 4, 4, 32, "window", True, BF16),
    ((2, 97, 1), (64, 64), 2, 2, 24, "chunk", False, BF16),
    ((1, 150, 2), (40, 72), 1, 2, 300, "window", True, F16),
    ((3, 33, 1), (40, 72), 5, 3, 4, "window", False, F16),
    ((2, 1, 2), (32, 32), 2, 4, 8, "window", True, F32),
    ((1, 65, 2), (32, 32), 8, 5, 1, "chunk", True, F32),
]


@pytest.mark.parametrize("case", range(len(GRID)))
def test_results_and_gradients_match_the_formula(case, device, backend):
    (B, T, H), (D, Dv), R, buckets, window, pattern, causal, dtype = GRID[case]
    numbers = draw_numbers(B, T, H, R, buckets)
    inputs = draw(B, T, H, D, Dv, dtype)
    check(inputs, numbers, device, window=window, pattern=pattern, causal=causal)


@pytest.mark.parametrize("pattern", ["window", "chunk"])
def test_padding_is_nobodys_and_gives_zeros(pattern, device, backend):
    leftpad, T = torch.tensor([0, 23, 60, 59], dtype=torch.int32), 60
    numbers, inputs = draw_numbers(4, T, 2, 2, 3), draw(4, T, 2, 32, 32)
    check(inputs, numbers, device, window=8, pattern=pattern, leftpad=leftpad)
    attend = functools.partial(
        bucket_attention, numbers=numbers.to(device), window=8, leftpad=leftpad.to(device)
    )
    ours = run(attend, *(t.to(device) for t in inputs))
    for row, pad in enumerate(leftpad.tolist()):
        assert not any(t[row, :pad].any() for t in ours.values())


@pytest.mark.parametrize("pattern", ["window", "chunk"])
def test_packed_sequences_stay_apart(pattern, device, backend):
    ends = [0, 1, 1, 2, 70, 131]
    numbers, inputs = draw_numbers(1, 131, 2, 2, 3)[0], [t[0] for t in draw(1, 131, 2, 32, 32)]
    numbers, inputs = numbers.to(device), [t.to(device) for t in inputs]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    settings = {"window": 200, "pattern": pattern}
    together = run(
        functools.partial(bucket_attention, numbers=numbers, cu_seqlens=cu_seqlens, **settings),
        *inputs,
    )
    for start, end in itertools.pairwise(ends):
        at = slice(start, end)
        attend = functools.partial(bucket_attention, numbers=numbers[None, at], **settings)
        alone = run(attend, *(t[None, at] for t in inputs))
        for name, t in alone.items():
            torch.testing.assert_close(together[name][at], t[0], rtol=1e-5, atol=2e-6)


def test_rounds_are_attention_over_the_union_of_what_they_find(device, backend):
    qk, v, _ = (t.double() for t in draw(2, 60, 2, 32, 32))
    numbers = hash_buckets(qk.float(), rounds=4, buckets=4)
    visible = visible_pairs(numbers, window=6, pattern="window", causal=True)
    assert (visible.sum(0) > 1).any(), "no pair is found twice"
    union = visible.any(0) & ~torch.eye(60, dtype=torch.bool)
    scores = torch.einsum("bihd,bjhd->bhij", qk, unit_keys(qk)) * 32**-0.5
    alone = ~union.any(-1)
    weights = scores.masked_fill(~union, float("-inf")).masked_fill(alone[..., None], 0.0)
    weights = torch.where(alone[..., None], torch.eye(60).double(), weights.softmax(-1))
    exact = torch.einsum("bhij,bjhd->bihd", weights, v)
    formula = lsh_attention_reference(qk, v, visible, scale=32**-0.5)
    torch.testing.assert_close(formula, exact)
    ours = lsh_attention(*(t.float().to(device) for t in (qk, v)), rounds=4, buckets=4, window=6)
    assert_close("out", ours.cpu(), exact)


@pytest.mark.parametrize("pattern", ["window", "chunk"])
def test_one_bucket_that_holds_all_is_dense(pattern, device, backend):
    qk, v, _ = draw(1, 90, 2, 32, 32)
    numbers = torch.zeros(1, 90, 2, 3, dtype=torch.int32)
    ours = bucket_attention(*(t.to(device) for t in (qk, v, numbers)), window=90, pattern=pattern)
    scores = torch.einsum("bihd,bjhd->bhij", qk.double(), unit_keys(qk.double())) * 32**-0.5
    hidden = torch.ones(90, 90, dtype=torch.bool).triu()
    hidden[0, 0] = False
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    assert_close("out", ours.cpu(), torch.einsum("bhij,bjhd->bihd", weights, v.double()))


def test_what_a_token_reads_does_not_depend_on_later_ones(device, backend):
    qk, v, _ = (t.to(device) for t in draw(1, 120, 2, 32, 32))
    attend = functools.partial(lsh_attention, rounds=3, buckets=6, window=7)
    whole = attend(qk, v)
    for length in (1, 2, 50, 119):
        prefix = attend(qk[:, :length], v[:, :length])
        torch.testing.assert_close(prefix, whole[:, :length], rtol=1e-5, atol=2e-6)
    # the published chunks are another matter, and this would notice
    chunks = functools.partial(attend, pattern="chunk")
    prefix, whole = chunks(qk[:, :50], v[:, :50]), chunks(qk, v)[:, :50]
    assert (prefix - whole).abs().max() > 1e-3


def test_a_token_sees_itself_only_when_it_sees_nothing_else(device, backend):
    qk, v, dout = (t.to(device) for t in draw(1, 40, 1, 32, 32))
    numbers = torch.arange(40, dtype=torch.int32, device=device)[None, :, None, None] // 2
    ours = run(functools.partial(bucket_attention, numbers=numbers, window=8), qk, v, dout)
    first, second = slice(0, None, 2), slice(1, None, 2)
    for at in (first, second):  # the first of a bucket has itself, the second one the first
        torch.testing.assert_close(ours["out"][:, at], v[:, first])
    torch.testing.assert_close(ours["dv"][:, first], dout[:, first] + dout[:, second])
    assert not ours["dv"][:, second].any()


def test_vectors_of_length_zero_have_no_direction(device, backend):
    inputs = draw(1, 40, 2, 32, 32)
    inputs[0][:, ::3] = 0.0
    check(inputs, draw_numbers(1, 40, 2, 2, 2), device, window=9)


def test_a_scale_may_be_negative(device, backend):
    check(draw(1, 40, 2, 32, 32), draw_numbers(1, 40, 2, 2, 2), device, window=9, scale=-0.3)


def test_runs_repeat_and_padding_may_hold_anything(device, backend):
    qk, v, dout = (t.to(device) for t in draw(2, 100, 2, 32, 32))
    numbers = draw_numbers(2, 100, 2, 3, 4).to(device)
    attend = functools.partial(bucket_attention, window=9)
    once, twice = (run(functools.partial(attend, numbers=numbers), qk, v, dout) for _ in range(2))
    for name, t in once.items():
        assert torch.equal(t, twice[name]), name
    inputs = [torch.cat([torch.full_like(t[:, :30], float("nan")), t], 1) for t in (qk, v, dout)]
    leftpad = torch.full((2,), 30, dtype=torch.int32, device=device)
    numbers = torch.cat([numbers[:, :30], numbers], 1)
    padded = run(functools.partial(attend, numbers=numbers, leftpad=leftpad), *inputs)
    for name, t in once.items():
        torch.testing.assert_close(padded[name][:, 30:], t, rtol=1e-5, atol=2e-6)
        assert not padded[name][:, :30].any(), name


def test_strided_inputs_are_read_as_they_lie(device, backend):
    qk, v, dout = (t.to(device) for t in draw(2, 40, 3, 32, 32))
    numbers = draw_numbers(2, 40, 3, 2, 3).to(device)

    def turned(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    attend = functools.partial(bucket_attention, window=9)
    plain = run(functools.partial(attend, numbers=numbers), qk, v, dout)
    views = run(functools.partial(attend, numbers=turned(numbers)), *map(turned, (qk, v, dout)))
    for name, t in plain.items():
        torch.testing.assert_close(views[name], t)


def test_a_compiled_call_gives_the_same(device, backend):
    qk, v, dout = (t.to(device) for t in draw(1, 70, 3, 32, 32))
    attend = functools.partial(lsh_attention, rounds=2, buckets=4, window=9)
    plain = run(attend, qk, v, dout)
    compiled = run(torch.compile(attend, fullgraph=True, backend="aot_eager"), qk, v, dout)
    for name, t in plain.items():
        torch.testing.assert_close(compiled[name], t)


def test_backward_runs_twice(device, backend):
    qk, v, dout = (t.to(device) for t in draw(1, 40, 2, 32, 32))
    qk.requires_grad_()
    out = lsh_attention(qk, v, rounds=2, buckets=4, window=9)
    first, second = (torch.autograd.grad(out, qk, dout, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.backends("reference")
def test_the_formula_has_the_gradient_of_itself():
    qk, v = (torch.randn(1, 9, 2, size, dtype=torch.float64) for size in (4, 3))
    numbers = draw_numbers(1, 9, 2, 3, 2)
    visible = visible_pairs(numbers, window=3, pattern="window", causal=True)
    attend = functools.partial(lsh_attention_reference, visible=visible, scale=0.4)
    assert torch.autograd.gradcheck(attend, (qk.requires_grad_(), v.requires_grad_()))


@pytest.mark.backends("reference")
class TestBuckets:
    def test_length_is_nothing_to_a_bucket_and_the_other_way_is_the_other_half(self):
        x = torch.randn(50, 16)
        numbers = hash_buckets(x, rounds=3, buckets=8)
        assert torch.equal(hash_buckets(3 * x, rounds=3, buckets=8), numbers)
        assert torch.equal(hash_buckets(-x, rounds=3, buckets=8), (numbers + 4) % 8)

    def test_more_rounds_begin_with_those_of_fewer(self):
        x = torch.randn(50, 16)
        four = hash_buckets(x, rounds=4, buckets=8, seed=3)
        assert torch.equal(hash_buckets(x, rounds=2, buckets=8, seed=3), four[:, :2])
        assert not torch.equal(hash_buckets(x, rounds=4, buckets=8, seed=4), four)

    def test_many_buckets_are_pairs_of_numbers(self):
        x = torch.randn(20_000, 32)
        numbers = hash_buckets(x, rounds=1, buckets=512)[:, 0].long()
        assert numbers.max() < 512
        assert numbers.unique().numel() > 400  # some are narrow, and their share is small

    def test_collisions_grow_with_the_cosine(self):
        q = torch.nn.functional.normalize(torch.randn(1, 16), dim=-1)
        noise = torch.nn.functional.normalize(torch.randn(1, 16), dim=-1)
        shares = []
        for blend in (0.05, 0.5, 1.0, 2.0):
            pair = hash_buckets(torch.cat([q, q + blend * noise]), rounds=2000, buckets=8)
            shares.append((pair[0] == pair[1]).float().mean().item())
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 0.9


@pytest.mark.backends("triton")
@pytest.mark.parametrize(
    ("error", "says", "change"),
    [
        (ValueError, "buckets", {"buckets": 3}),
        (ValueError, "multiple of 4", {"buckets": 130}),
        (TypeError, "buckets", {"buckets": 4.0}),
        (ValueError, "rounds", {"rounds": 0}),
        (ValueError, "window", {"window": 0}),
        (TypeError, "window", {"window": 2.0}),
        (ValueError, "pattern", {"pattern": "block"}),
        (ValueError, "seed", {"seed": -1}),
        (TypeError, "`v`", {"v": torch.randn(1, 9, 2, 8).half()}),
        # grouped heads: queries are keys here
        (ValueError, "`v`", {"v": torch.randn(1, 9, 1, 8)}),
        (TypeError, "`leftpad`", {"leftpad": torch.zeros(1)}),
        (ValueError, "`leftpad`", {"leftpad": torch.zeros(2, dtype=torch.int32)}),
        (TypeError, "float", {"qk": torch.randn(1, 9, 2, 8).double()}),
    ],
)
def test_what_is_wrong_is_said_by_name(error, says, change, device, backend):
    call = {"qk": torch.randn(1, 9, 2, 8), "v": torch.randn(1, 9, 2, 8)}
    call |= {"rounds": 2, "buckets": 4, "window": 3} | change
    with pytest.raises(error, match=says):
        lsh_attention(call.pop("qk"), call.pop("v"), **call)


def test_packed_sequences_have_no_padding(device, backend):
    starts = torch.tensor([0, 9], dtype=torch.int32, device=device)
    x, numbers = torch.randn(9, 2, 32, device=device), draw_numbers(1, 9, 2, 1, 2)[0].to(device)
    with pytest.raises(ValueError, match="`leftpad`"):
        bucket_attention(x, x, numbers, window=3, leftpad=starts, cu_seqlens=starts)


def test_nothing_gives_nothing(device, backend):
    for shape in ((0, 9, 2, 32), (2, 0, 2, 32)):
        x = torch.randn(shape, device=device, requires_grad=True)
        out = lsh_attention(x, x, rounds=2, buckets=4, window=3)
        out.sum().backward()
        assert out.shape == x.grad.shape == shape


GROWTH = r"""
import json, re, torch; torch.set_num_threads(1)
from bitnet_triton.kernels import lsh_attention

def held(T):
    qk, v = (torch.randn(1, T, 2, 32, requires_grad=True) for _ in range(2))
    lsh_attention(qk, v, rounds=2, buckets=max(T // 64, 4), window=128).sum().backward()
    # ru_maxrss would begin with that of the process which has started this one
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

first = held(512)
print(json.dumps([held(T) - first for T in (16384, 65536)]))
"""


@pytest.mark.backends("triton")
def test_memory_is_linear_in_the_length(device, backend):
    """Of the whole process, forward and backward; 4.2 was seen, an exponent of 1.0."""
    if device != "cpu" or not Path("/proc/self/status").exists():
        pytest.skip("it is the memory of the process that is measured, as Linux tells it")
    command = [sys.executable, "-c", GROWTH]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    short, long = json.loads(output)
    assert 2.8 < long / short < 6.0  # 16 for what grows with the square


# (B, T, H), (D, Dv), rounds, buckets, window, dtype
LAST = [
    ((2, 300, 3), (32, 32), 3, 4, 9, F32),
    ((3, 141, 2), (40, 72), 1, 8, 16, BF16),
    ((1, 130, 2), (64, 64), 5, 32, 500, F16),
    ((2, 1, 2), (32, 32), 2, 4, 8, F32),
    ((1, 129, 1), (32, 32), 2, 2, 1, F32),
]


@pytest.mark.parametrize("case", LAST, ids=str)
def test_the_last_token_alone_gets_what_all_together_give_it(case, device, backend):
    (B, T, H), (D, Dv), R, buckets, window, dtype = case
    qk, v, _ = draw(B, T, H, D, Dv, dtype)
    numbers = draw_numbers(B, T, H, R, buckets)
    left = torch.randint(0, T, (B,), dtype=torch.int32)
    left[0] = T - 1  # it sees itself alone
    visible = visible_pairs(numbers, window=window, pattern="window", causal=True, leftpad=left)
    exact, eager = (
        lsh_attention_reference(*(t.to(of) for t in (qk, v)), visible=visible, scale=0.3)[:, -1:]
        for of in (torch.float64, dtype)
    )
    padding = torch.arange(T) < left[:, None]
    qk, v = (t.masked_fill(padding[..., None, None], float("nan")) for t in (qk, v))
    in_memory = numbers.permute(0, 2, 3, 1).contiguous()
    ours = bucket_attention_last(
        *(t.to(device) for t in (qk, v, in_memory)), window=window, scale=0.3,
        leftpad=left.to(device),
    )  # fmt: skip
    step = torch.finfo(dtype).eps * exact.abs().max()
    worst = 4 * max((eager.double() - exact).abs().max(), step).item()
    assert_close("out", ours.cpu(), exact, eager=eager, worst=worst)


@pytest.mark.parametrize("buckets", [2, 24, 132, None], ids=["one", "many", "two factors", "near"])
def test_a_step_writes_the_buckets_of_its_token(buckets, device, backend):
    if backend != "triton":
        pytest.skip("only launches are recorded")
    from bitnet_triton.kernels.lsh_attention.decode import launch_hash_step

    B, T, H, D, R = 2, 9, 3, 40, 3 if buckets else 1
    x = torch.randn(B, T, H, D).to(device)
    if buckets:
        widths = tuple(f // 2 for f in bucket_factors(buckets))
        directions = Directions(rotation_rows(D, R, buckets, 5, x.device), widths, True)
        expected = hash_buckets(x, rounds=R, buckets=buckets, seed=5)
    else:  # the nearest of 21 of each head
        rows = torch.randn(H, 21, D).to(device)
        directions = Directions(rows, (21,), False)
        expected = torch.einsum("bthd,hcd->bthc", x, rows).argmax(-1, keepdim=True).int()
    found = torch.full((B, H, R, T), -1, dtype=torch.int32, device=device)
    slots = torch.tensor([4, 7], dtype=torch.int32, device=device)
    launch_hash_step(x, directions, found, slots)
    for b, slot in enumerate((4, 7)):
        assert torch.equal(found[b, :, :, slot], expected[b, slot])
        found[b, :, :, slot] = -1
    assert (found == -1).all()  # no other token's
