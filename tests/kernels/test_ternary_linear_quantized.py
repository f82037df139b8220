"""ternary_linear_quantized: codes in, merged weights, residual."""

import pytest
import torch

from bitnet_triton.kernels import (
    MergedTernaryWeight,
    TernaryWeight,
    quantize_activations,
    ternary_linear,
    ternary_linear_quantized,
)
from bitnet_triton.testing import assert_close, random_codes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# rows of each part: one, odd ones, many tiles, a tile each
PARTS = [(64,), (72, 20, 4), (256, 64, 64), (136, 136), (4, 4, 4)]

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


def weights(parts, K, device="cpu"):
    return [
        TernaryWeight.from_codes(random_codes(N, K, device=device), 0.01 * (i + 1))
        for i, N in enumerate(parts)
    ]


def quantized(x):
    codes, scale = quantize_activations(x)
    return codes, scale, codes.sum(-1, dtype=torch.int32)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 33), (40, 130)], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_matches_the_exact_product_of_every_part(parts, shape, dtype, device, backend):
    x = torch.randn(*shape, device=device)
    codes, scale, sums = quantized(x)
    each = weights(parts, shape[1], device)
    y = ternary_linear_quantized(codes, scale, sums, MergedTernaryWeight.merge(each), dtype=dtype)
    exact = (
        torch.cat([(codes.double() @ w.codes().double().t()) * w.scale.double() for w in each], -1)
        * scale.double()
    )
    assert y.dtype == dtype
    assert_close("y", y, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [(64,), (136, 136), (72, 20, 4)], ids=str)
def test_is_the_unfused_path_bit_for_bit(parts, dtype, device, backend):
    each = weights(parts, 96, device)
    for M in (1, 2, 35):
        x = torch.randn(M, 96, device=device).to(dtype)
        residual = torch.randn(M, sum(parts), device=device).to(dtype)
        expected = torch.cat([ternary_linear(x, weight) for weight in each], -1)
        merged = MergedTernaryWeight.merge(each)
        assert torch.equal(ternary_linear_quantized(*quantized(x), merged, dtype=dtype), expected)
        # rounded before the residual is added, as a sum of two tensors is
        result = ternary_linear_quantized(*quantized(x), merged, residual)
        assert torch.equal(result, residual + expected)


def test_takes_a_plain_weight_leading_dimensions_strides_and_no_rows(device, backend):
    (weight,) = weights([24], 16, device)
    x = torch.randn(2, 5, 16, device=device)
    codes, scale, sums = quantized(x)
    residual = torch.randn(24, 5, 2, device=device).permute(2, 1, 0)
    y = ternary_linear_quantized(codes, scale, sums, weight, residual)
    assert torch.equal(y, residual + ternary_linear(x, weight))
    y = ternary_linear_quantized(
        codes[:, ::2], scale[:, ::2], sums[:, ::2], weight, dtype=torch.float32
    )
    assert torch.equal(y, ternary_linear(x[:, ::2], weight))
    empty = quantized(torch.randn(0, 16, device=device))
    assert ternary_linear_quantized(*empty, weight, dtype=torch.float32).shape == (0, 24)


def test_a_residual_that_is_not_a_number_stays_in_its_place(device, backend):
    (weight,) = weights([24], 16, device)
    residual = torch.zeros(2, 24, device=device)
    residual[1, 7] = float("nan")
    y = ternary_linear_quantized(*quantized(torch.randn(2, 16, device=device)), weight, residual)
    assert torch.isnan(y).nonzero().tolist() == [[1, 7]]


def test_parts_are_views_of_the_merged_matrix():
    each = weights((72, 20, 4), 33)
    merged = MergedTernaryWeight.merge(each)
    assert merged.shape == (96, 33)
    assert merged.packed.nbytes == sum(weight.packed.nbytes for weight in each)
    for part, weight in zip(merged.parts(), each):
        assert torch.equal(part.codes(), weight.codes())
        assert torch.equal(part.scale, weight.scale)
        assert part.packed.untyped_storage().data_ptr() == merged.packed.data_ptr()


def test_weights_that_cannot_be_merged_are_named():
    with pytest.raises(ValueError, match="`weights`: expected 1 to 3, got 4"):
        MergedTernaryWeight.merge(weights((4,) * 4, 8))
    with pytest.raises(ValueError, match="`weights`: expected 1 to 3, got 0"):
        MergedTernaryWeight.merge([])
    with pytest.raises(ValueError, match="`weights`: expected one K, got 8, 9"):
        MergedTernaryWeight.merge([*weights((4,), 8), *weights((4,), 9)])
    with pytest.raises(ValueError, match="`weights`: expected one device, got cpu, meta"):
        MergedTernaryWeight.merge([*weights((4,), 8), weights((4,), 8)[0].to("meta")])


def test_is_traced_as_one_op():
    merged = MergedTernaryWeight.merge(weights((8, 4), 16))
    codes, scale, sums = quantized(torch.randn(2, 16))
    residual = torch.randn(2, 12)

    def product(codes, scale, sums, residual):
        return ternary_linear_quantized(codes, scale, sums, merged, residual)

    compiled = torch.compile(product, fullgraph=True, backend="eager")
    args = codes, scale, sums, residual
    assert torch.equal(compiled(*args), product(*args))


CODES, SCALE, SUMS = torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 1), torch.ones(2).int()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(4, 8)}, TypeError, "`weight`: expected a TernaryWeight or"),
        ({"codes": CODES.float()}, TypeError, "`codes`: expected dtype int8"),
        ({"codes": CODES[:, :7]}, ValueError, r"`codes`: expected \[... K\] with K=8"),
        ({"codes": CODES.to("meta")}, ValueError, "`codes`: expected a tensor on cpu"),
        ({"codes": 3}, TypeError, "`codes`: expected a torch.Tensor"),
        ({"scale": SCALE.double()}, TypeError, "`scale`: expected dtype float32"),
        ({"scale": SCALE[:, 0]}, ValueError, r"`scale`: expected \[2, 1\], got \[2\]"),
        ({"sums": SUMS.long()}, TypeError, "`sums`: expected dtype int32"),
        ({"sums": SUMS[:1]}, ValueError, r"`sums`: expected \[2\], got \[1\]"),
        ({"residual": torch.ones(2, 5)}, ValueError, r"`residual`: expected \[2, 4\]"),
        ({"residual": torch.ones(2, 4).int()}, TypeError, "`residual`: expected dtype"),
        ({"residual": torch.ones(2, 4).half()}, TypeError, "`residual`: expected dtype float32"),
        ({"residual": torch.ones(2, 4, device="meta")}, ValueError, "`residual`: .* on cpu"),
        ({"dtype": None}, TypeError, "`dtype`: expected float32, float16 or bfloat16, got None"),
        ({"dtype": torch.int8}, TypeError, "`dtype`: .* got torch.int8"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"codes": CODES, "scale": SCALE, "sums": SUMS, "dtype": torch.float32}
    arguments["weight"] = weights((4,), 8)[0]
    with pytest.raises(error, match=message):
        ternary_linear_quantized(**arguments | change)
