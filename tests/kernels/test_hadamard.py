"""The rotation, against Sylvester's matrix in float64."""

import pytest
import torch

from bitnet_triton.kernels import hadamard
from bitnet_triton.kernels.hadamard.reference import hadamard_reference
from bitnet_triton.testing import assert_close

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 7, 128), (2, 0, 32), (33, 96)], ids=str)
def test_matches_reference(shape, dtype, device, backend):
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()
    y = hadamard(x)
    y.backward(dy)
    pairs = {"y": (y.detach(), x.detach()), "dx": (x.grad, dy)}
    for name, (ours, of) in pairs.items():
        exact = hadamard_reference(of.double())
        assert_close(name, ours, exact, eager=hadamard_reference(of.float()).to(dtype))


def test_the_reference_is_an_orthogonal_matrix_of_equal_magnitudes():
    matrix = hadamard_reference(torch.eye(8, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(8, dtype=torch.float64))
    assert torch.allclose(matrix.abs(), torch.full((8, 8), 8**-0.5, dtype=torch.float64))
    assert (matrix[0] > 0).all()
    assert (matrix[1, ::2] > 0).all()
    assert (matrix[1, 1::2] < 0).all()
    blocks = hadamard_reference(torch.eye(24, dtype=torch.float64))
    assert torch.equal(blocks, torch.block_diag(matrix, matrix, matrix))


def test_one_large_value_is_spread_over_its_block(device, backend):
    x = torch.zeros(1, 128, device=device)
    x[0, 77] = 100.0
    assert torch.allclose(hadamard(x).abs(), torch.full_like(x, 100 * 128**-0.5))


def test_strided_rows_are_read_and_it_traces(device, backend):
    x = torch.randn(64, 10, device=device).T
    exact = hadamard_reference(x.double())
    eager = hadamard_reference(x)
    assert_close("y", hadamard(x), exact, eager=eager)
    compiled = torch.compile(hadamard, backend="aot_eager", fullgraph=True)
    assert_close("y", compiled(x.contiguous()), exact, eager=eager)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`x`: expected rows of a multiple of 16 values, got 40"):
        hadamard(torch.randn(2, 40))
    with pytest.raises(TypeError, match="`x`"):
        hadamard(torch.ones(2, 64, dtype=torch.int32))
