"""The 2-bit codec and TernaryWeight."""

# ruff: noqa: E501 - a table of calls and messages

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from bitnet_triton.kernels import TernaryWeight
from bitnet_triton.kernels.packing import has_invalid_code, pack_codes, unpack_codes
from bitnet_triton.kernels.ternary_linear.compiled import unpack_unsigned
from bitnet_triton.testing import random_codes

VALID_BYTES = [b for b in range(256) if all((b >> (2 * j)) & 3 != 3 for j in range(4))]


@st.composite
def code_matrices(draw):
    rows, K = draw(st.integers(1, 9)), draw(st.integers(1, 17))
    values = draw(
        st.lists(st.sampled_from([-1, 0, 1]), min_size=4 * rows * K, max_size=4 * rows * K)
    )
    return torch.tensor(values, dtype=torch.int8).view(4 * rows, K)


@given(code_matrices())
@settings(deadline=None)
def test_codes_survive_packing(codes):
    packed = pack_codes(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codes.shape[0] // 4, codes.shape[1])
    assert torch.equal(unpack_codes(packed), codes)
    assert not has_invalid_code(packed)
    weight = TernaryWeight.from_codes(codes, 2.0)
    assert weight.shape == tuple(codes.shape)
    assert torch.equal(weight.codes(), codes)


def test_four_rows_share_a_byte_from_low_bits_to_high():
    codes = torch.tensor([[-1], [0], [1], [-1], [1], [1], [0], [-1]], dtype=torch.int8)
    # byte row r holds rows r, r + 2, r + 4, r + 6, each as code + 1
    rows = [0b01_10_10_00, 0b00_10_00_01]
    assert pack_codes(codes).flatten().tolist() == rows


def test_every_valid_byte_survives_the_round_trip():
    packed = torch.tensor([VALID_BYTES], dtype=torch.uint8)
    assert len(VALID_BYTES) == 81
    assert torch.equal(pack_codes(unpack_codes(packed)), packed)
    assert torch.equal(TernaryWeight.from_checkpoint(packed, 1.0).packed, packed)


@pytest.mark.parametrize("value", sorted(set(range(256)) - set(VALID_BYTES)))
def test_every_byte_with_a_three_is_refused_wherever_it_stands(value):
    packed = torch.full((3, 5), 0b01010101, dtype=torch.uint8)
    packed[torch.randint(3, ()), torch.randint(5, ())] = value
    with pytest.raises(
        ValueError, match="`packed`: expected codes 0, 1 or 2 in every two bits, got a 3"
    ):
        TernaryWeight.from_checkpoint(packed, 1.0)


@pytest.mark.parametrize("shape", [(8, 8), (3, 5), (1, 1), (2, 6)], ids=str)
def test_the_compiled_codec_is_the_codec(shape):
    """Whole words where the matrix divides into them, single bytes elsewhere."""
    packed = torch.tensor(
        np.random.default_rng(torch.randint(99, ()).item()).choice(VALID_BYTES, shape)
    )
    packed = packed.to(torch.uint8)
    assert torch.equal(unpack_unsigned(packed) - 1, unpack_codes(packed))
    shifted = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view(shape)  # odd address
    assert torch.equal(unpack_unsigned(shifted) - 1, unpack_codes(packed))


def test_packing_leaves_its_argument_alone():
    codes = random_codes(8, 5)
    before = codes.clone()
    TernaryWeight.from_codes(codes, 1.0)
    assert torch.equal(codes, before)


@pytest.mark.parametrize(
    "scale", [0.25, torch.tensor(0.25), torch.tensor([0.25]), np.float64(0.25)]
)
def test_a_scale_is_a_number_or_one_element(scale):
    weight = TernaryWeight.from_codes(random_codes(4, 3), scale)
    assert weight.scale.dtype == torch.float32
    assert weight.scale.tolist() == [0.25]


def test_a_weight_moves_between_devices(device):
    weight = TernaryWeight.from_codes(random_codes(4, 3), 1.0)
    moved = weight.to(device)
    assert moved.device == moved.scale.device
    assert moved.device.type == device
    assert torch.equal(moved.codes().cpu(), weight.codes())


def test_two_bits_a_weight_are_held():
    weight = TernaryWeight.from_codes(random_codes(64, 128), 1.0)
    assert weight.packed.untyped_storage().nbytes() * 8 == 2 * 64 * 128


CODES = torch.zeros(8, 3, dtype=torch.int8)
PACKED = torch.zeros(2, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TernaryWeight.from_codes([0], 1.0), TypeError, "`codes`: expected a torch.Tensor, got list"),
        (lambda: TernaryWeight.from_codes(CODES.float(), 1.0), TypeError, "`codes`: expected dtype int8, got float32"),
        (lambda: TernaryWeight.from_codes(CODES[0], 1.0), ValueError, r"`codes`: expected \[N K\], got \[3\]"),
        (lambda: TernaryWeight.from_codes(CODES[:, :0], 1.0), ValueError, r"`codes`: expected \[N K\], each at least 1, got \[8, 0\]"),
        (lambda: TernaryWeight.from_codes(CODES[:6], 1.0), ValueError, r"`codes`: expected \[N K\] with N a multiple of 4, got \[6, 3\]"),
        (lambda: TernaryWeight.from_codes(CODES + 2, 1.0), ValueError, "`codes`: expected values -1, 0 or 1, got values from 2 to 2"),
        (lambda: TernaryWeight.from_codes(CODES - 2, 1.0), ValueError, "got values from -2 to -2"),
        (lambda: TernaryWeight.from_codes(CODES, 0.0), ValueError, "`scale`: expected a positive finite number, got 0.0"),
        (lambda: TernaryWeight.from_codes(CODES, -1.0), ValueError, "`scale`: .* got -1.0"),
        (lambda: TernaryWeight.from_codes(CODES, float("nan")), ValueError, "`scale`: .* got nan"),
        (lambda: TernaryWeight.from_codes(CODES, float("inf")), ValueError, "`scale`: .* got inf"),
        (lambda: TernaryWeight.from_codes(CODES, torch.ones(2)), ValueError, "`scale`: expected one element, got 2"),
        (lambda: TernaryWeight.from_checkpoint(None, 1.0), TypeError, "`packed`: expected a torch.Tensor, got NoneType"),
        (lambda: TernaryWeight.from_checkpoint(CODES, 1.0), TypeError, "`packed`: expected dtype uint8, got int8"),
        (lambda: TernaryWeight.from_checkpoint(PACKED[0], 1.0), ValueError, r"`packed`: expected \[N/4 K\], got \[3\]"),
        (lambda: TernaryWeight.from_checkpoint(PACKED[:0], 1.0), ValueError, r"`packed`: expected \[N/4 K\], each at least 1, got \[0, 3\]"),
        (lambda: TernaryWeight.from_checkpoint(PACKED, -0.5), ValueError, "`scale`: .* got -0.5"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
