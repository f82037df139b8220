"""Products of queries and weights with codes, in integers: what the kernel computes on a CPU.

Over codes of 8 bits, queries and weights become two planes of int8, 15 bits together; over codes of
4 bits, one.

A plane of weights counts to 127 for the largest product of a weight and the scale of its value
among the tokens of a tile and a row. Rounded to the nearest, all tokens below a 254th of that would
be lost, and with them a mean that values have in common. So the places of a tile round at
thresholds that are spread evenly over a step: a sum of many small weights stays what it was, and
what is added to the error is random.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(1.5 * 2**23)
LEAST = tl.constexpr(1e-30)  # a largest value that may be divided by
# What planes count to; they have room for 16383, as a weight may come out just above 1
_STEPS = tl.constexpr(16319.0)


@triton.jit
def _planes(x) -> tuple:
    """Return integers, magnitudes up to 16383, as int8: how many 128s, and the rest.

    x comes with ``_ROUND`` added, which leaves no place for fractions and rounds half to even; its
    own bits are zeros where those of the integers are.
    """
    bits = x.to(tl.int32, bitcast=True)
    return (bits >> 7).to(tl.int8), (bits & 127).to(tl.int8)


@triton.jit
def spread(N: tl.constexpr) -> tl.tensor:
    """Return what N places add before they round to the nearest: each multiple of 1 / N once.

    They lie in (-0.5, 0.5), those of neighbours far apart; N is a power of two from 64 on.
    """
    return (tl.arange(0, N) * 39 % N).to(tl.float32) * (1.0 / N) + (0.5 / N - 0.5)


@triton.jit
def _of_planes(many, rest) -> tl.tensor:
    """Return what products with planes, int32, amount to: float32."""
    return ((many << 7) + rest).to(tl.float32)


@triton.jit
def largest_magnitude(x, AXIS: tl.constexpr) -> tl.tensor:
    """Return the largest magnitude along an axis, by bit patterns, which order like magnitudes."""
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=AXIS)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _ordered(bits) -> tl.tensor:
    """Turn bit patterns of float32 into integers that order alike, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def power(x) -> tl.tensor:
    """Return 2**x of x at most 0, to 3e-6 of it; of less than -126 that of -126, nearly nothing."""
    x = tl.where(x < -126.0, -126.0, x)  # NaN passes
    whole = x + _ROUND
    f = x - (whole - _ROUND)
    p = 0.00958285 * f + 0.05590643
    p = p * f + 0.24024099
    p = p * f + 0.69312419
    p = p * f + 1.0
    bits = p.to(tl.int32, bitcast=True) + (whole.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def row_max(x, FAST: tl.constexpr) -> tl.tensor:
    """Return the largest value of each row; FAST: by integers, where a CPU need not mind NaN."""
    if FAST:
        bits = tl.max(_ordered(x.to(tl.int32, bitcast=True)), axis=1)
        return _ordered(bits).to(tl.float32, bitcast=True)
    else:
        return tl.max(x, axis=1)


@triton.jit
def scores_by_planes(q_low, q_high, largest_q, k_low, k_high, scale) -> tl.tensor:
    """Return products of queries [M, HALF] twice with codes of 8 bits, float32 [M, N]."""
    largest = tl.maximum(largest_q, LEAST)
    many_low, rest_low = _planes(q_low * (_STEPS / largest)[:, None] + _ROUND)
    many_high, rest_high = _planes(q_high * (_STEPS / largest)[:, None] + _ROUND)
    many = tl.dot(many_low, k_low, out_dtype=tl.int32)
    many = tl.dot(many_high, k_high, many, out_dtype=tl.int32)
    rest = tl.dot(rest_low, k_low, out_dtype=tl.int32)
    rest = tl.dot(rest_high, k_high, rest, out_dtype=tl.int32)
    return _of_planes(many, rest) * ((largest * (1.0 / _STEPS))[:, None] * scale[None, :])


@triton.jit
def scores_by_bytes(q_low, q_high, k_low, k_high, s_low, s_high, z_low, z_high) -> tl.tensor:
    """Return products of queries [M, HALF] twice with keys of 4 bits, float32 [M, N].

    Queries take a byte: what is rounded off there meets codes around their middle, 8, and is far
    less than what keys have lost.
    """
    x_low = q_low * s_low[None, :]
    x_high = q_high * s_high[None, :]
    largest = tl.maximum(largest_magnitude(tl.maximum(tl.abs(x_low), tl.abs(x_high)), 1), LEAST)
    step = largest * (1.0 / 127.0)
    zero = x_low * (z_low - 8.0)[None, :] + x_high * (z_high - 8.0)[None, :]
    x_low = x_low * (127.0 / largest)[:, None] + _ROUND
    x_high = x_high * (127.0 / largest)[:, None] + _ROUND
    middle = (x_low - _ROUND) + (x_high - _ROUND)
    shift = tl.sum(middle * (8.0 * step)[:, None] + zero, axis=1)
    codes = tl.dot(x_low.to(tl.int32, bitcast=True).to(tl.int8), k_low, out_dtype=tl.int32)
    codes = tl.dot(x_high.to(tl.int32, bitcast=True).to(tl.int8), k_high, codes, out_dtype=tl.int32)
    return codes.to(tl.float32) * step[:, None] - shift[:, None]


@triton.jit
def values_by_planes(w, largest_v, v_low, v_high) -> tuple:
    """Return products of w [M, N] with both halves of codes of 8 bits, float32 [M, HALF].

    w are weights, up to 1, times scales of values, up to ``largest_v``.
    """
    many, rest = _planes(w * (_STEPS / largest_v) + _ROUND)
    # weights are not negative: products of signed codes with them need no offset
    many &= 127
    rest &= 127
    low = _of_planes(
        tl.dot(many, v_low, out_dtype=tl.int32), tl.dot(rest, v_low, out_dtype=tl.int32)
    )
    high = _of_planes(
        tl.dot(many, v_high, out_dtype=tl.int32), tl.dot(rest, v_high, out_dtype=tl.int32)
    )
    step = largest_v * (1.0 / _STEPS)
    return low * step, high * step


@triton.jit
def weights_in_bytes(w, thresholds) -> tuple:
    """Return w [M, N] as int8 up to 127, a step [M, 1] for each row, and w as it is counted then.

    w are weights times scales of values of 4 bits, none of them negative.
    """
    largest = tl.maximum(largest_magnitude(w, 1), LEAST)
    step = (largest * (1.0 / 127.0))[:, None]
    rounded = w * (127.0 / largest)[:, None] + thresholds[None, :] + _ROUND
    # weights are not negative: products of signed codes with them need no offset
    codes = rounded.to(tl.int32, bitcast=True).to(tl.int8) & 127
    return codes, step, (rounded - _ROUND) * step
