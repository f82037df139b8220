"""Buckets by random rotations (arXiv:2001.04451, section 2), and the order that they give."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_dtype, check_tensor
from bitnet_triton.kernels.quantize.op import FLOATS
from bitnet_triton.runtime import register_op

# more buckets than these are pairs of two numbers, each by a rotation of its own
_MOST_OF_ONE = 128
# rotated values at a time
_ROTATED = 2**24


def bucket_factors(buckets: int) -> tuple[int, ...]:
    """Return the even factors of a number of buckets: itself, or two that are near each other.

    Raises:
        TypeError: ``buckets`` is no integer.
        ValueError: it is not even, or above 128 no product of two even numbers.
    """
    if not isinstance(buckets, int) or isinstance(buckets, bool):
        raise TypeError(f"`buckets`: expected an integer, got {type(buckets).__name__}")
    if buckets < 2 or buckets % 2:
        raise ValueError(f"`buckets`: expected an even number from 2 on, got {buckets}")
    if buckets <= _MOST_OF_ONE:
        return (buckets,)
    if buckets % 4:
        raise ValueError(
            f"`buckets`: above {_MOST_OF_ONE} expected a multiple of 4, which is a product of two "
            f"even numbers, got {buckets}"
        )
    quarter = buckets // 4
    small = next(n for n in range(math.isqrt(quarter), 0, -1) if quarter % n == 0)
    return (2 * small, 2 * (quarter // small))


@functools.lru_cache(maxsize=64)
def rotations(D: int, rounds: int, buckets: int, seed: int, device: torch.device) -> Tensor:
    """Return normals [D, R N], N half the sum of the factors, drawn on the CPU for any device.

    Each round draws from a generator of its own: more rounds have those of fewer in front.
    """
    width = sum(bucket_factors(buckets)) // 2
    # what inference mode makes could not be used outside of it
    with torch.inference_mode(False):
        drawn = [
            torch.randn(D, width, generator=torch.Generator().manual_seed(_seed_of(seed, r)))
            for r in range(rounds)
        ]
        return torch.cat(drawn, 1).to(device)


@functools.lru_cache(maxsize=64)
def rotation_rows(D: int, rounds: int, buckets: int, seed: int, device: torch.device) -> Tensor:
    """Return the columns of ``rotations`` as rows, [1, R N, D]."""
    with torch.inference_mode(False):
        return rotations(D, rounds, buckets, seed, device).T.contiguous()[None]


def _seed_of(seed: int, r: int) -> int:
    # neighbouring seeds of a generator share no numbers, but those of (seed, round) must not meet
    return (seed * 1_000_003 + r) % 2**63


def _launch_buckets(x: Tensor, rounds: int, buckets: int, seed: int) -> Tensor:
    rotated_by = rotations(x.shape[-1], rounds, buckets, seed, x.device)
    factors = bucket_factors(buckets)
    rows, width = x.reshape(-1, x.shape[-1]), sum(factors) // 2
    numbers = torch.empty(len(rows), rounds, dtype=torch.int32, device=x.device)
    step = max(_ROTATED // rotated_by.shape[1], 1)
    for at in range(0, len(rows), step):
        rotated = (rows[at : at + step].float() @ rotated_by).unflatten(-1, (rounds, width))
        number = torch.zeros(rotated.shape[:2], dtype=torch.int64, device=x.device)
        for part, factor in zip(rotated.split([f // 2 for f in factors], -1), factors):
            # the largest of [xR; -xR] has the largest magnitude
            largest = part.abs().argmax(-1, keepdim=True)
            is_negative = part.gather(-1, largest) < 0
            number = number * factor + (largest + is_negative * (factor // 2)).squeeze(-1)
        numbers[at : at + step] = number
    return numbers.view(*x.shape[:-1], rounds)


def _fake_buckets(x: Tensor, rounds: int, buckets: int, seed: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], rounds], dtype=torch.int32)


_buckets = register_op("lsh_attention_buckets", _launch_buckets, _fake_buckets)


def hash_buckets(x: Tensor, *, rounds: int, buckets: int, seed: int = 0) -> Tensor:
    """Return the bucket of each vector in each round: argmax of [xR; -xR] (arXiv:2001.04451).

    Vectors of one direction have one bucket, whatever their length. Above 128 a bucket is a pair
    of numbers by two rotations. A round does not depend on how many there are.

    Args:
        x: [..., D] float16, bfloat16 or float32.
        rounds: R, how many times to hash.
        buckets: how many there are; even.
        seed: of the rotations.

    Returns:
        int32 [..., R]; no gradient.

    Raises:
        TypeError: ``x`` has another dtype, or a number is no integer.
        ValueError: a number is too small, or ``buckets`` is odd.
    """
    check_tensor("x", x)
    check_dtype("x", x, *FLOATS)
    check_count("rounds", rounds, 1)
    check_count("seed", seed, 0)
    bucket_factors(buckets)
    return _buckets(x.detach(), rounds, buckets, seed)


def check_count(name: str, value: object, least: int) -> None:
    """Raise unless ``value`` is an integer from ``least`` on."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}`: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"`{name}`: expected at least {least}, got {value}")


def _launch_places(
    numbers: Tensor, lengths: list[Tensor | None], window: int, chunked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T = numbers.shape[-1]
    keys, padding = numbers.long(), None
    position = torch.arange(T, device=numbers.device)
    cu_seqlens, leftpad = lengths
    if cu_seqlens is not None and T:
        sequence = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
        keys = keys + sequence * 2**31
    if leftpad is not None:
        padding = (position < leftpad[:, None])[:, None]  # [B 1 T]
        keys = keys.masked_fill(padding, 2**62)
    keys, order = keys.sort(dim=-1, stable=True)
    start = torch.searchsorted(keys, keys)
    stop = torch.searchsorted(keys, keys, right=True)
    place = position.expand(order.shape)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    if chunked:
        chunk = position // window * window
        low = torch.maximum(start, chunk - window)
        ahead = torch.minimum(stop, chunk + 2 * window) - 1
    else:
        low = torch.maximum(start, position - window + 1)
        ahead = torch.minimum(stop, position + window) - 1
    low, ahead = low.gather(-1, rank), ahead.gather(-1, rank)
    if padding is not None:
        low, ahead = low.masked_fill(padding, T), ahead.masked_fill(padding, -1)
    order, rank, low, ahead = (t.int() for t in (order, rank, low, ahead))
    return order, rank, low, ahead


def _fake_places(
    numbers: Tensor, lengths: list[Tensor | None], window: int, chunked: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, rank, low, ahead = (torch.empty_like(numbers) for _ in range(4))
    return order, rank, low, ahead


# int32 [R B H T] of bucket numbers -> order, rank, low and ahead of a ``BucketCall``
find_places = register_op("lsh_attention_places", _launch_places, _fake_places)
