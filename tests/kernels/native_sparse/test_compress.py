"""Compression of blocks: every kind, its gradients, packed and padded sequences."""

import pytest
import torch

from bitnet_triton.kernels import compress_blocks
from bitnet_triton.kernels.native_sparse.reference import compress_reference
from bitnet_triton.runtime import use_backend
from bitnet_triton.testing import RMS_LIMITS, assert_close

KINDS = ["mean", "weights", "linear", "mlp"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, T, Hk, D, block, stride
SHAPES = [(2, 70, 2, 16, 32, 16), (1, 131, 3, 24, 12, 4), (2, 9, 1, 8, 8, 8), (1, 33, 1, 128, 2, 1)]


def parameters(kind, Hk, D, block, positions, dtype=torch.float32):
    """Return the keyword arguments of a kind, of values that leave results of size 1."""
    made, hidden = {}, D + 3
    if kind == "weights":
        made["weights"] = torch.randn(Hk, block) / block**0.5
    elif kind == "linear":
        made["linear"] = torch.randn(Hk, block, D, hidden) / (block * D) ** 0.5
    elif kind == "mlp":
        first = torch.randn(Hk, block, D, hidden) / (block * D) ** 0.5
        made["mlp"] = (first, torch.randn(Hk, hidden, D) / hidden**0.5)
    if positions:
        made["positions"] = torch.randn(Hk, block, D)
    return {
        k: tuple(t.to(dtype) for t in v) if k == "mlp" else v.to(dtype) for k, v in made.items()
    }


def leaves(made):
    """Return the tensors of ``parameters`` by name."""
    flat = {k: v for k, v in made.items() if k != "mlp"}
    return flat | {f"mlp{i}": t for i, t in enumerate(made.get("mlp", ()))}


def run(fn, x, made, dy, dtype, **sizes):
    x = x.detach().to(dtype).clone().requires_grad_()
    made = {
        k: tuple(t.detach().to(dtype).clone().requires_grad_() for t in v)
        if k == "mlp" else v.detach().to(dtype).clone().requires_grad_()
        for k, v in made.items()
    }  # fmt: skip
    y = fn(x, **made, **sizes)
    y.backward(dy.to(dtype)[..., : y.shape[-1]])
    return {"y": y, "dx": x.grad} | {f"d{k}": t.grad for k, t in leaves(made).items()}


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.backends("triton", "reference")
def test_matches_reference(kind, positions, shape, dtype, device, backend):
    B, T, Hk, D, block, stride = shape
    made = parameters(kind, Hk, D, block, positions, dtype)
    x = torch.randn(B, T, Hk, D).to(dtype)
    count = (T - block) // stride + 1
    dy = torch.randn(B, count, Hk, D + 3).to(dtype)
    sizes = {"block": block, "stride": stride}
    with use_backend(backend):
        ours = run(compress_blocks, x, made, dy, dtype, **sizes)
    eager = run(compress_reference, x, made, dy, dtype, **sizes)
    exact = run(compress_reference, x, made, dy, torch.float64, **sizes)
    assert ours["y"].shape == exact["y"].shape
    for name in exact:
        # sums over all blocks, some of which nearly cancel, in another order
        rms = 2 * RMS_LIMITS[dtype] if name != "y" else None
        errors = (eager[name].double() - exact[name]).abs().max()
        share = 4 if name == "y" else 16  # what is added up may be fifty times the sum
        worst = share * (errors + torch.finfo(dtype).eps * exact[name].abs().max()).item()
        assert_close(name, ours[name], exact[name], eager=eager[name], rms=rms, worst=worst)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference_are_right(kind):
    made = parameters(kind, 2, 3, 4, True, torch.float64)
    names = list(leaves(made))

    def run(x, *tensors):
        given = dict(zip(names, tensors))
        more = {k: v for k, v in given.items() if not k.startswith("mlp")}
        if "mlp0" in given:
            more["mlp"] = (given["mlp0"], given["mlp1"])
        return compress_reference(x, block=4, stride=2, **more)

    x = torch.randn(1, 11, 2, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, *leaves(made).values())]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_compressed_alone(kind):
    lengths = [1, 40, 0, 7, 1, 30]
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    x = torch.randn(sum(lengths), 2, 8, requires_grad=True)
    made, sizes = parameters(kind, 2, 8, 8, False), {"block": 8, "stride": 4}
    y = compress_blocks(x, cu_seqlens=cu, **made, **sizes)
    alone = [compress_blocks(part[None], **made, **sizes)[0] for part in x.split(lengths)]
    expected = torch.cat(alone)
    assert y.shape[0] == sum(lengths) // 4
    torch.testing.assert_close(y[: len(expected)], expected)
    assert not y[len(expected) :].any()
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, x, dy)[0]
    torch.testing.assert_close(got, torch.autograd.grad(expected, x, dy[: len(expected)])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_count_from_the_first_token_of_a_row(kind):
    x, left = torch.randn(3, 41, 2, 8, requires_grad=True), [0, 13, 38]
    made, sizes = parameters(kind, 2, 8, 8, False), {"block": 8, "stride": 4}
    y = compress_blocks(x, leftpad=torch.tensor(left, dtype=torch.int32), **made, **sizes)
    rows, grads = [], []
    dy = torch.randn_like(y)
    for b, start in enumerate(left):
        row = compress_blocks(x[b : b + 1, start:], **made, **sizes)
        rows.append(row)
        torch.testing.assert_close(y[b, : row.shape[1]], row[0])
        assert not y[b, row.shape[1] :].any()
        grads.append(torch.autograd.grad(row.sum() * 0 + (row * dy[b, : row.shape[1]]).sum(), x,
                                         retain_graph=True)[0])  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], sum(grads))


def test_short_sequences_have_no_block():
    x = torch.randn(2, 7, 1, 8, requires_grad=True)
    for made in (parameters(kind, 1, 8, 8, True) for kind in KINDS):
        y = compress_blocks(x, block=8, stride=4, **made)
        assert y.shape == (2, 0, 1, 11 if "linear" in made else 8)
    y.sum().backward()
    assert not x.grad.any()


def test_gradients_repeat_bit_by_bit():
    x, w = torch.randn(2, 300, 2, 16, requires_grad=True), torch.randn(2, 32, requires_grad=True)
    y = compress_blocks(x, weights=w, block=32, stride=16)
    dy = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, (x, w), dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": torch.randn(2, 9, 8)}, ValueError, r"`x`: expected \[B T H D\]"),
        ({"x": torch.ones(2, 9, 1, 8).int()}, TypeError, "`x`: expected dtype"),
        ({"block": 6}, ValueError, "`block`: expected a multiple of `stride`, 4, got 6"),
        ({"stride": 0}, ValueError, "`stride`: expected at least 1"),
        ({"block": 8.0}, TypeError, "`block`: expected an integer"),
        ({"weights": torch.ones(1, 4)}, ValueError, r"`weights`: expected \[Hk block\]"),
        ({"linear": torch.ones(1, 8, 7, 3)}, ValueError, r"`linear`: expected \[Hk block D E\]"),
        ({"weights": torch.ones(1, 8), "linear": torch.ones(1, 8, 8, 3)}, ValueError,
         "`linear`: expected none beside `weights`"),
        ({"mlp": (torch.ones(1, 8, 8, 3), torch.ones(1, 4, 8))}, ValueError, r"`mlp\[1\]`"),
        ({"positions": torch.ones(1, 8, 8).half()}, TypeError, "`positions`: expected dtype"),
        ({"leftpad": torch.zeros(3, dtype=torch.int32)}, ValueError, r"`leftpad`: expected \[B\]"),
        ({"leftpad": torch.zeros(2)}, TypeError, "`leftpad`: expected dtype int32"),
        ({"x": torch.randn(9, 1, 8), "cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError,
         "`cu_seqlens`: expected"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes, error, match):
    arguments = {"x": torch.randn(2, 9, 1, 8), "block": 8, "stride": 4} | changes
    with pytest.raises(error, match=match):
        compress_blocks(arguments.pop("x"), **arguments)


def test_it_compiles_into_one_graph():
    made = {"weights": torch.randn(2, 8), "positions": torch.randn(2, 8, 16)}

    @torch.compile(fullgraph=True)
    def run(x, weights, positions, cu):
        y = compress_blocks(x, weights=weights, positions=positions, block=8, stride=4)
        return y, compress_blocks(x.flatten(0, 1), block=8, stride=4, cu_seqlens=cu)

    x, cu = torch.randn(1, 50, 2, 16, requires_grad=True), torch.tensor([0, 20, 50]).int()
    y, packed = run(x, **made, cu=cu)
    torch.testing.assert_close(y, compress_blocks(x, **made, block=8, stride=4))
    expected = compress_blocks(x[0], block=8, stride=4, cu_seqlens=cu)
    torch.testing.assert_close(packed, expected)
    dy = torch.randn_like(packed)
    got, want = (torch.autograd.grad(t, x, dy, retain_graph=True)[0] for t in (packed, expected))
    torch.testing.assert_close(got, want)
