"""dense_linear against the float64 product, on every backend."""

import pytest
import torch

from bitnet_triton import BackendUnavailableError, use_backend
from bitnet_triton.kernels import dense_linear, dense_linear_topk
from bitnet_triton.kernels.dense_linear.op import _triton_objection
from bitnet_triton.kernels.dense_linear.reference import dense_linear_reference
from bitnet_triton.testing import assert_close

SHAPES = [(1, 128, 64), (1, 130, 100), (2, 1, 1), (3, 257, 515), (4, 64, 2560), (7, 40, 33)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.pairwise
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, with_bias, device, backend):
    M, N, K = shape
    x, weight = (
        torch.randn(M, K, dtype=dtype, device=device),
        torch.randn(N, K, dtype=dtype, device=device),
    )
    bias = torch.randn(N, dtype=dtype, device=device) if with_bias else None
    if backend == "triton" and _triton_objection(x, weight) is not None:
        with use_backend(backend), pytest.raises(BackendUnavailableError):
            dense_linear(x, weight, bias)
        return
    with use_backend(backend):
        y = dense_linear(x, weight, bias)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    eager = torch.nn.functional.linear(x, weight, bias)
    assert_close("y", y, dense_linear_reference(*wide), eager=eager)


def test_keeps_leading_dimensions_and_takes_strided_and_empty_input():
    weight = torch.randn(32, 16)
    x = torch.randn(2, 5, 32)[:, -1:, ::2]
    torch.testing.assert_close(dense_linear(x, weight), x @ weight.t())
    assert dense_linear(torch.randn(0, 16), weight).shape == (0, 32)
    assert dense_linear(torch.randn(16), weight).shape == (32,)


def test_is_traced_as_one_op():
    weight, x = torch.randn(32, 16), torch.randn(1, 16)
    compiled = torch.compile(dense_linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), dense_linear(x, weight))
    compiled = torch.compile(dense_linear_topk, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight, 2)[1], dense_linear_topk(x, weight, 2)[1])


@pytest.mark.pairwise
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 3])
def test_the_largest_outputs_are_those_of_the_linear(M, dtype, k, device, backend):
    x, weight = (torch.randn(s, 40, device=device).to(dtype) for s in (M, 390))
    bias = torch.randn(390, device=device).to(dtype)
    if backend == "triton" and _triton_objection(x, weight) is not None:
        pytest.skip("PyTorch multiplies on a GPU")
    with use_backend(backend):
        y = dense_linear(x, weight, bias)
        values, indices = dense_linear_topk(x, weight, k, bias)
    # by value, then by index: 16-bit outputs have ties
    order = [sorted(range(390), key=lambda i: (-row[i], i))[:k] for row in y.tolist()]
    assert indices.tolist() == order
    assert torch.equal(values, y.gather(1, indices))


def test_more_outputs_than_programs_keep_come_from_pytorch():
    x, weight = torch.randn(2, 16), torch.randn(64, 16)
    values, indices = dense_linear_topk(x.view(2, 1, 16), weight, 17)
    expected = (x @ weight.t()).topk(17)
    assert indices.shape == (2, 1, 17)
    torch.testing.assert_close(values.flatten(0, 1), expected.values)
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="best 16 at most"):
        dense_linear_topk(x, weight, 17)
    assert dense_linear_topk(x[:0], weight, 3)[1].shape == (0, 3)


@pytest.mark.parametrize("k", [0, 65])
def test_a_bad_number_of_outputs_is_named(k):
    with pytest.raises(ValueError, match="`k`: expected an integer from 1 to N=64"):
        dense_linear_topk(torch.randn(2, 16), torch.randn(64, 16), k)


def test_many_rows_are_refused_by_the_forced_kernel():
    with use_backend("triton"), pytest.raises(BackendUnavailableError, match="from 5 rows on"):
        dense_linear(torch.randn(5, 16), torch.randn(32, 16))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), ValueError, "`x`: expected .* K=5"),
        ((torch.ones(()), torch.ones(4, 5)), ValueError, "`x`"),
        ((torch.ones(2, 5), torch.ones(4)), ValueError, "`weight`"),
        ((torch.ones(2, 5).half(), torch.ones(4, 5)), TypeError, "`x`"),
        ((torch.ones(2, 5), torch.ones(4, 5).int()), TypeError, "`weight`"),
        ((torch.ones(2, 5), torch.ones(4, 5), torch.ones(3)), ValueError, "`bias`"),
        ((torch.ones(2, 5), torch.ones(4, 5), torch.ones(4).half()), TypeError, "`bias`"),
        ((torch.ones(2, 5), torch.ones(4, 5, device="meta")), ValueError, "`x`"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    x, weight, *bias = arguments
    with pytest.raises(error, match=message):
        dense_linear(x, weight, *bias)
    with pytest.raises(error, match=message):
        dense_linear_topk(x, weight, 1, *bias)
