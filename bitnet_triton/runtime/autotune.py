"""Tile sizes of the Triton kernels, by kind of device, op and shape class.

The tables for GPUs hold configurations that compile without register spills for every target in
the ahead-of-time test (docs/gpu-kernels.md). Those for sm_90 were measured on an H200; the others
are chosen on paper. Those for CPUs were measured: a tile fills the caches of a core, not the
registers of a multiprocessor.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from bitnet_triton.runtime.measured import measured_tiles

Tiles = dict[str, int]

_ANY = sys.maxsize
# Added to the size of float32 heads, whose products run on no matrix units
_FLOAT32 = 1024
_FLOAT32_SUFFIX = "_float32"
_SELECTED_SUFFIX = "_selected"
_NARROW_SUFFIX = "_narrow"
_LISTED_SUFFIX = "_listed"
_SMALLEST_FITTED = 16

# Forward and dq where rows select by scores: as large as fits beside what the selection needs
_SELECTED: dict[int, Tiles] = {
    256: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    _FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    _FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
}

# Also where it takes keys or rows from a list, or only pairs that were selected
_DKDV: dict[int, Tiles] = {
    128: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    256: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    _FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}

# kernel -> the largest size of a shape class -> its tiles. The size is the number of rows of
# activations (few for decoding, many for prefill and training), or what the launcher says
_GPU: dict[str, dict[int, Tiles]] = {
    "quantize_activations_fwd": {  # the length of a row
        1024: {"BLOCK_K": 1024, "num_warps": 4},
        4096: {"BLOCK_K": 4096, "num_warps": 4},
        8192: {"BLOCK_K": 8192, "num_warps": 8},
        32768: {"BLOCK_K": 32768, "num_warps": 16},
    },
    "weight_sums_fwd": {  # the number of elements
        _ANY: {"BLOCK": 4096, "BLOCKS": 8, "num_warps": 8},
    },
    "weight_stats_fwd": {  # the number of programs of the kernel before it
        _ANY: {"BLOCK": 1024, "num_warps": 4},
    },
    "rms_norm_fwd": {  # the length of a row, here and below
        1024: {"BLOCK_D": 1024, "num_warps": 4},
        4096: {"BLOCK_D": 4096, "num_warps": 8},
        16384: {"BLOCK_D": 16384, "num_warps": 16},
    },
    "rms_norm_bwd": {
        1024: {"BLOCK_D": 1024, "num_warps": 4},
        4096: {"BLOCK_D": 4096, "num_warps": 8},
        16384: {"BLOCK_D": 16384, "num_warps": 16},
    },
    "rms_norm_quantize_fwd": {
        1024: {"BLOCK_D": 1024, "num_warps": 4},
        4096: {"BLOCK_D": 4096, "num_warps": 8},
        16384: {"BLOCK_D": 16384, "num_warps": 16},
    },
    "relu2_mul_norm_quantize_fwd": {
        1024: {"BLOCK_F": 1024, "num_warps": 4},
        8192: {"BLOCK_F": 8192, "num_warps": 8},
        16384: {"BLOCK_F": 16384, "num_warps": 16},
    },
    "silu_mul_quantize_fwd": {
        1024: {"BLOCK_F": 1024, "num_warps": 4},
        8192: {"BLOCK_F": 8192, "num_warps": 8},
        # twice as long spills with any number of warps
        16384: {"BLOCK_F": 16384, "num_warps": 16},
    },
    "ternary_linear_fwd": {
        # 256 outputs by 64 tokens for 4 warps, two programs a multiprocessor; twice that for 8:
        # the most accumulators that registers hold, and the fewest bytes read for a product
        1024: {
            "BLOCK_M": 64,
            "BLOCK_R": 64,
            "BLOCK_K": 64,
            "IN_PLACE": True,
            "num_warps": 4,
            "num_stages": 3,
        },
        _ANY: {
            "BLOCK_M": 64,
            "BLOCK_R": 128,
            "BLOCK_K": 128,
            "IN_PLACE": True,
            "num_warps": 8,
            "num_stages": 3,
        },
    },
    "ternary_linear_fwd_few": {
        # 16 columns even for one token: AMD has no instruction for 8. 32 KB of weights in flight
        16: {
            "BLOCK_M": 16,
            "BLOCK_R": 16,
            "BLOCK_K": 128,
            "SLICES": 8,
            "num_warps": 8,
            "num_stages": 3,
        },
        32: {
            "BLOCK_M": 32,
            "BLOCK_R": 16,
            "BLOCK_K": 128,
            "SLICES": 4,
            "num_warps": 4,
            "num_stages": 3,
        },
        64: {
            "BLOCK_M": 64,
            "BLOCK_R": 16,
            "BLOCK_K": 64,
            "SLICES": 4,
            "num_warps": 4,
            "num_stages": 3,
        },
    },
    "ternary_linear_bwd": {
        _ANY: {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2},
    },
    # here and below: with 64 rows on the left, Triton 3.7 multiplies float32 as TF32 on sm_100,
    # whatever precision is asked for
    "ternary_linear_bwd_float32": {
        _ANY: {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2},
    },
    "bit_linear_fwd": {  # for few tokens: more take the kernel from codes
        256: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    },
    "bit_linear_fwd_from_codes": {
        _ANY: {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 128,
            "GROUP": 8,
            "num_warps": 8,
            "num_stages": 3,
        },
    },
    "bit_linear_codes": {  # the number of elements
        _ANY: {"BLOCK": 4096, "num_warps": 8},
    },
    "bit_linear_bwd_scale": {
        _ANY: {"BLOCK_M": 4, "BLOCK_K": 512, "num_warps": 4},
    },
    "bit_linear_bwd_dx": {
        _ANY: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    },
    "bit_linear_bwd_dweight": {
        _ANY: {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
    },
    "bit_linear_bwd_dweight_float32": {
        _ANY: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    },
    "split_activations_fwd": {  # the length of a row
        4096: {"BLOCK_K": 4096, "num_warps": 4},
        8192: {"BLOCK_K": 8192, "num_warps": 8},
        32768: {"BLOCK_K": 32768, "num_warps": 16},
    },
    "int8_linear_fwd": {
        8: {"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        _ANY: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    "int8_linear_topk_fwd": {
        8: {"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        _ANY: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    "merge_best": {  # the number of candidates
        _ANY: {"BLOCK_C": 1024, "num_warps": 4},
    },
    "rotary": {  # the size of a head
        128: {"BLOCK_H": 32, "num_warps": 4},
        _ANY: {"BLOCK_H": 8, "num_warps": 4},
    },
    "rotary_and_store": {
        128: {"BLOCK_H": 32, "num_warps": 4},
        _ANY: {"BLOCK_H": 8, "num_warps": 4},
    },
    "flash_attention_fwd": {  # the size of a head, and _FLOAT32 more of float32, here and below
        # a tile of keys serves 128 queries: with 64, the second-level cache would be the limit
        128: {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        256: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        _FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        _FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_fwd_selected": _SELECTED,
    "flash_attention_bwd_dq_selected": _SELECTED,
    "flash_attention_select": {
        256: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        _FLOAT32 + 64: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        _FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "flash_attention_bwd_delta": {
        _ANY: {"BLOCK_M": 32, "num_warps": 8},
    },
    "flash_attention_bwd_dq": {
        128: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        256: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        _FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        _FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_bwd_dkdv": _DKDV,
    "flash_attention_bwd_dkdv_listed": _DKDV,
    "flash_attention_decode": {
        # with fewer warps, float32 heads of 128 values spill on sm_90
        _ANY: {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    },
    "flash_attention_decode_merge": {
        _ANY: {"num_warps": 4},
    },
}

# What is not as on NVIDIA: larger tiles spill on gfx942, or exceed its 64 KB of shared memory
_AMD: dict[str, dict[int, Tiles]] = {
    "flash_attention_fwd": {
        **_GPU["flash_attention_fwd"],
        128: {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_bwd_dq": {
        **_GPU["flash_attention_bwd_dq"],
        128: {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
}
for _name in ("flash_attention_bwd_dkdv", "flash_attention_bwd_dkdv_listed"):
    _AMD[_name] = {
        **_DKDV,
        128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    }
# What other GPUs have no instruction for
_NVIDIA: dict[str, dict[int, Tiles]] = {
    "ternary_linear_fwd_one": {  # the length of a row
        4096: {"BLOCK_R": 4, "BLOCK_K": 128, "UNROLL": 4, "num_warps": 4},
        _ANY: {"BLOCK_R": 2, "BLOCK_K": 512, "UNROLL": 4, "num_warps": 4},
    },
}

# What is not as on other NVIDIA GPUs, where shared memory is smaller and there is no wgmma
_SM90: dict[str, dict[int, Tiles]] = {
    # two programs of four warps a multiprocessor: a barrier holds up one of them only
    "ternary_linear_fwd": {
        _ANY: {
            "BLOCK_M": 64,
            "BLOCK_R": 64,
            "BLOCK_K": 128,
            "IN_PLACE": True,
            "num_warps": 4,
            "num_stages": 3,
        },
    },
    # a slice more costs more to add up than it gains, unless there are few rows
    "ternary_linear_fwd_few": {
        8: {
            "BLOCK_M": 8,
            "BLOCK_R": 16,
            "BLOCK_K": 256,
            "SLICES": 2,
            "num_warps": 2,
            "num_stages": 5,
        },
        16: {
            "BLOCK_M": 16,
            "BLOCK_R": 16,
            "BLOCK_K": 256,
            "SLICES": 2,
            "num_warps": 2,
            "num_stages": 5,
        },
        32: _GPU["ternary_linear_fwd_few"][32],
        64: _GPU["ternary_linear_fwd_few"][64],
    },
    "ternary_linear_fwd_few_narrow": {
        8: {
            "BLOCK_M": 8,
            "BLOCK_R": 16,
            "BLOCK_K": 256,
            "SLICES": 4,
            "num_warps": 4,
            "num_stages": 4,
        },
        16: {
            "BLOCK_M": 16,
            "BLOCK_R": 16,
            "BLOCK_K": 256,
            "SLICES": 4,
            "num_warps": 4,
            "num_stages": 4,
        },
        32: _GPU["ternary_linear_fwd_few"][32],
        64: _GPU["ternary_linear_fwd_few"][64],
    },
    "bit_linear_fwd": {
        256: {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    "bit_linear_fwd_from_codes": {
        # of a plain int8 product: 1.02 POPS for 2048 tokens, 2560 -> 6912
        _ANY: {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 128,
            "GROUP": 8,
            "num_warps": 4,
            "num_stages": 3,
        },
    },
    "int8_linear_fwd": {
        4: {"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        **_GPU["int8_linear_fwd"],
    },
    "int8_linear_topk_fwd": {
        4: {"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        **_GPU["int8_linear_topk_fwd"],
    },
    "flash_attention_fwd": {
        **_GPU["flash_attention_fwd"],
        64: {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    },
    "flash_attention_bwd_dq": {
        **_GPU["flash_attention_bwd_dq"],
        64: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    },
    "flash_attention_bwd_dkdv": {
        **_DKDV,
        64: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    },
    "flash_attention_decode": {
        128: {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        **_GPU["flash_attention_decode"],
    },
}


def _in_order(*tables: dict[str, dict[int, Tiles]]) -> dict[str, dict[int, Tiles]]:
    """Merge tables, a later one in place of an earlier one, with their classes by size."""
    merged = {kernel: classes for table in tables for kernel, classes in table.items()}
    return {kernel: dict(sorted(classes.items())) for kernel, classes in merged.items()}


# what a GPU is called -> its tables
_GPU_TABLES = {
    "cuda": _in_order(_GPU, _NVIDIA),
    "sm_90": _in_order(_GPU, _NVIDIA, _SM90),
    "hip": _in_order(_GPU, _AMD),
}
_forced_gpu: ContextVar[str | None] = ContextVar("bitnet_triton_gpu", default=None)

_CPU: dict[str, dict[int, Tiles]] = {
    "quantize_activations_fwd": {
        1024: {"BLOCK_K": 1024},
        4096: {"BLOCK_K": 4096},
        8192: {"BLOCK_K": 8192},
        32768: {"BLOCK_K": 32768},
    },
    "weight_sums_fwd": {
        _ANY: {"BLOCK": 1024, "BLOCKS": 64},
    },
    "weight_stats_fwd": {
        _ANY: {"BLOCK": 1024},
    },
    "rms_norm_fwd": {
        1024: {"BLOCK_D": 1024},
        4096: {"BLOCK_D": 4096},
        16384: {"BLOCK_D": 16384},
    },
    "rms_norm_bwd": {
        1024: {"BLOCK_D": 1024},
        4096: {"BLOCK_D": 4096},
        16384: {"BLOCK_D": 16384},
    },
    "rms_norm_quantize_fwd": {
        1024: {"BLOCK_D": 1024},
        4096: {"BLOCK_D": 4096},
        16384: {"BLOCK_D": 16384},
    },
    "relu2_mul_norm_quantize_fwd": {
        1024: {"BLOCK_F": 1024},
        8192: {"BLOCK_F": 8192},
        16384: {"BLOCK_F": 16384},
    },
    "silu_mul_quantize_fwd": {
        1024: {"BLOCK_F": 1024},
        8192: {"BLOCK_F": 8192},
        16384: {"BLOCK_F": 16384},
    },
    "ternary_linear_fwd": {
        # whole rows, up to 8192: memory is read in one stream, tokens are skipped where M ends
        1: {"BLOCK_M": 1, "BLOCK_R": 32, "BLOCK_K": 8192},
        2: {"BLOCK_M": 2, "BLOCK_R": 32, "BLOCK_K": 8192},
        4: {"BLOCK_M": 4, "BLOCK_R": 32, "BLOCK_K": 8192},
        64: {"BLOCK_M": 8, "BLOCK_R": 32, "BLOCK_K": 8192},
        # weights on the right: that operand is rearranged, once for all tokens of the tile
        128: {"BLOCK_M": 128, "BLOCK_R": 64, "BLOCK_K": 256, "TOKENS_LEFT": True},
        _ANY: {"BLOCK_M": 256, "BLOCK_R": 64, "BLOCK_K": 256, "TOKENS_LEFT": True},
    },
    "dense_linear_fwd": {
        1: {"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 512},
        2: {"BLOCK_M": 2, "BLOCK_N": 128, "BLOCK_K": 512},
        4: {"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 512},
    },
    "ternary_linear_bwd": {
        _ANY: {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_R": 64},
    },
    # the largest tiles of each class: ``fitted_tiles`` makes them smaller for smaller matrices
    "bit_linear_fwd": {
        _ANY: {"BLOCK_M": 512, "BLOCK_N": 128, "BLOCK_K": 512, "TOKENS_LEFT": True},
    },
    "bit_linear_bwd_dx": {
        _ANY: {"BLOCK_M": 512, "BLOCK_N": 256, "BLOCK_K": 256, "TOKENS_LEFT": True},
    },
    "bit_linear_bwd_dweight": {
        _ANY: {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 512, "FROM_CODES": False},
    },
    "bit_linear_bwd_dequantize": {
        _ANY: {"BLOCK_M": 64, "BLOCK_K": 64},
    },
    # as on GPUs, which alone launch these: the tests run them on a CPU
    "bit_linear_fwd_from_codes": {
        _ANY: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8},
    },
    "bit_linear_codes": {
        _ANY: {"BLOCK": 4096},
    },
    "bit_linear_bwd_scale": {
        _ANY: {"BLOCK_M": 4, "BLOCK_K": 512},
    },
    "split_activations_fwd": {
        1024: {"BLOCK_K": 1024},
        4096: {"BLOCK_K": 4096},
        8192: {"BLOCK_K": 8192},
        32768: {"BLOCK_K": 32768},
    },
    "int8_linear_fwd": {
        1: {"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 8192},
        2: {"BLOCK_M": 2, "BLOCK_N": 128, "BLOCK_K": 8192},
        # four tokens are eight vectors: the most that one pass over the rows takes
        32: {"BLOCK_M": 4, "BLOCK_N": 128, "BLOCK_K": 8192},
        _ANY: {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 512},
    },
    "int8_linear_topk_fwd": {
        1: {"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 8192},
        2: {"BLOCK_M": 2, "BLOCK_N": 128, "BLOCK_K": 8192},
        # four tokens are eight vectors: the most that one pass over the rows takes
        32: {"BLOCK_M": 4, "BLOCK_N": 128, "BLOCK_K": 8192},
        _ANY: {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 512},
    },
    "merge_best": {_ANY: {"BLOCK_C": 1024}},
    "rotary": {_ANY: {"BLOCK_H": 1}},
    "rotary_and_store": {_ANY: {"BLOCK_H": 1}},
    "flash_attention_fwd": {  # the size of a head, here and below
        _ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    # one size for all three: scores are added up alike
    "flash_attention_fwd_selected": {
        _ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_dq_selected": {
        _ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_select": {
        _ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_delta": {
        _ANY: {"BLOCK_M": 64},
    },
    "flash_attention_bwd_dq": {
        _ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_dkdv": {
        _ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_dkdv_listed": {
        _ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_decode": {
        _ANY: {"BLOCK_N": 128},
    },
    "flash_attention_decode_merge": {
        _ANY: {},
    },
}


def tiles(kernel: str, size: int, device: torch.device, dtype: torch.dtype | None = None) -> Tiles:
    """Return block sizes of a kernel; for GPUs ``num_warps`` and ``num_stages`` as well.

    Args:
        kernel: its name without the leading underscore and ``_kernel``.
        size: number of rows of activations, at most ``largest_size``; of kernels whose program
            holds a row ("quantize_activations_fwd", the norms) the length of a row.
        device: that the kernel runs on; any but a CPU counts as a GPU.
        dtype: of what it multiplies, where float32 has tiles of its own.
    """
    name, classes = _classes(kernel, device, dtype)
    for largest in classes:
        if size <= largest:
            break
    else:
        raise ValueError(f"`size`: {kernel} has tiles up to {largest}, got {size}")
    # every launch comes by here: the tables are read once, and a GPU asks for its index as well
    found = measured_tiles("cpu") if device.type == "cpu" else _measured_on_gpu(device)
    config = classes[largest]
    return config if not found else _usable(found.get((name, largest)), config)


def _classes(
    kernel: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[str, dict[int, Tiles]]:
    table = _table(device)
    if dtype == torch.float32 and kernel + _FLOAT32_SUFFIX in table:
        kernel += _FLOAT32_SUFFIX
    return kernel, table[kernel]


def _table(device: torch.device) -> dict[str, dict[int, Tiles]]:
    return _CPU if device.type == "cpu" else _GPU_TABLES[_forced_gpu.get() or _gpu_of(device)]


@functools.cache
def _gpu_of(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "hip"
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return "sm_90" if is_hopper else "cuda"


@contextlib.contextmanager
def tiles_for(gpu: str) -> Iterator[None]:
    """Give the tiles of "cuda", "sm_90" or "hip" inside the block, whatever GPU is here.

    The ahead-of-time compilation records launches under it.
    """
    token = _forced_gpu.set(gpu)
    try:
        yield
    finally:
        _forced_gpu.reset(token)


def has_tiles(kernel: str, device: torch.device) -> bool:
    """Tell whether a kernel is one for such a device: some are for some GPUs only."""
    return kernel in _table(device)


def _measured_on_gpu(device: torch.device) -> dict[tuple[str, int], Tiles]:
    return measured_tiles(str(device)) if device.type == "cuda" else {}


def _usable(measured: Tiles | None, config: Tiles) -> Tiles:
    """Return measured tiles, if there are any and the kernel still has the same ones."""
    return config if measured is None or measured.keys() != config.keys() else measured


def fitted_tiles(
    kernel: str, device: torch.device, *, M: int, N: int, K: int, dtype: torch.dtype | None = None
) -> Tiles:
    """Return block sizes as ``tiles`` does, smaller on a CPU where they would not fill the matrix.

    Blocks for a CPU are large, and what hangs over the edge of a matrix is computed all the same:
    each is halved until at most an eighth of what is computed is wasted, or it is small.
    """
    fitted = dict(tiles(kernel, M, device, dtype))
    if device.type != "cpu":
        return fitted
    for name, size in (("BLOCK_M", M), ("BLOCK_N", N), ("BLOCK_K", K)):
        while fitted[name] > _SMALLEST_FITTED and 8 * (-size % fitted[name]) > size:
            fitted[name] //= 2
    return fitted


def head_size(D: int, dtype: torch.dtype) -> int:
    """Return what attention asks ``tiles`` for: the size of a head, apart for float32."""
    return D + (_FLOAT32 if dtype == torch.float32 else 0)


def largest_size(kernel: str) -> int:
    """Return the largest size that a kernel has tiles for."""
    return max(_GPU[kernel])


def size_classes(kernel: str, device: torch.device) -> dict[int, Tiles]:
    """Return the tiles of a kernel that stand in the table, by the largest size of their class."""
    return dict(_table(device)[kernel])


def all_tiles() -> dict[str, list[Tiles]]:
    """Return every configuration that is launched on such a GPU untuned, by kernel."""
    found: dict[str, list[Tiles]] = {}
    for kernel, classes in _GPU_TABLES[_forced_gpu.get() or "cuda"].items():
        name = kernel
        for suffix in (_FLOAT32_SUFFIX, _SELECTED_SUFFIX, _NARROW_SUFFIX, _LISTED_SUFFIX):
            name = name.removesuffix(suffix)
        found.setdefault(name, []).extend(classes.values())
    return found
