"""Tiles of the kernels on CPUs, measured: a tile fills the caches of a core, not its registers."""

from __future__ import annotations

import sys

Tiles = dict[str, int]

# What a kernel may be called in a table after its name, where it has several sets of tiles: for
# float32, for few byte rows, for keys or rows from a list
FLOAT32_SUFFIX = "_float32"
_SUFFIXES = (FLOAT32_SUFFIX, "_narrow", "_listed")

ANY = sys.maxsize


def kernel_of(name: str) -> str:
    """Return the kernel that a table has tiles for under ``name``."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


# kernel -> the largest size of a shape class -> its tiles, as in tiles_gpu.py
CPU: dict[str, dict[int, Tiles]] = {
    "quantize_activations_fwd": {
        1024: {"BLOCK_K": 1024},
        4096: {"BLOCK_K": 4096},
        8192: {"BLOCK_K": 8192},
        32768: {"BLOCK_K": 32768},
    },
    "weight_sums_fwd": {
        ANY: {"BLOCK": 1024, "BLOCKS": 64},
    },
    "weight_stats_fwd": {
        ANY: {"BLOCK": 1024},
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
        # whole rows, up to 8192; tokens are skipped where M ends. One token reads the quarters of
        # the rows as four streams: further apart is faster, but small matrices need some programs
        1: {"BLOCK_M": 1, "BLOCK_R": 64, "BLOCK_K": 8192},
        2: {"BLOCK_M": 2, "BLOCK_R": 32, "BLOCK_K": 8192},
        4: {"BLOCK_M": 4, "BLOCK_R": 32, "BLOCK_K": 8192},
        64: {"BLOCK_M": 8, "BLOCK_R": 32, "BLOCK_K": 8192},
        # weights on the right: that operand is rearranged, once for all tokens of the tile
        128: {"BLOCK_M": 128, "BLOCK_R": 64, "BLOCK_K": 256, "TOKENS_LEFT": True},
        ANY: {"BLOCK_M": 256, "BLOCK_R": 64, "BLOCK_K": 256, "TOKENS_LEFT": True},
    },
    "dense_linear_fwd": {
        1: {"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 512},
        2: {"BLOCK_M": 2, "BLOCK_N": 128, "BLOCK_K": 512},
        4: {"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 512},
    },
    "ternary_linear_bwd": {
        ANY: {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_R": 64},
    },
    # the largest tiles of each class: ``fitted_tiles`` makes them smaller for smaller matrices
    "bit_linear_fwd": {
        ANY: {"BLOCK_M": 512, "BLOCK_N": 128, "BLOCK_K": 512, "TOKENS_LEFT": True},
    },
    "bit_linear_bwd_dx": {
        ANY: {"BLOCK_M": 512, "BLOCK_N": 256, "BLOCK_K": 256, "TOKENS_LEFT": True},
    },
    "bit_linear_bwd_dweight": {
        ANY: {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 512, "FROM_CODES": False},
    },
    "bit_linear_bwd_dequantize": {
        ANY: {"BLOCK_M": 64, "BLOCK_K": 64},
    },
    # as on GPUs, which alone launch these: the tests run them on a CPU
    "bit_linear_fwd_from_codes": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8},
    },
    "bit_linear_codes": {
        ANY: {"BLOCK": 4096},
    },
    "bit_linear_bwd_scale": {
        ANY: {"BLOCK_M": 4, "BLOCK_K": 512},
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
        ANY: {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 512},
    },
    "int8_linear_topk_fwd": {
        1: {"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 8192},
        2: {"BLOCK_M": 2, "BLOCK_N": 128, "BLOCK_K": 8192},
        # four tokens are eight vectors: the most that one pass over the rows takes
        32: {"BLOCK_M": 4, "BLOCK_N": 128, "BLOCK_K": 8192},
        ANY: {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 512},
    },
    "merge_best": {ANY: {"BLOCK_C": 1024}},
    "rotary": {ANY: {"BLOCK_H": 1}},
    "rotary_and_store": {ANY: {"BLOCK_H": 1}},
    "flash_attention_fwd": {  # the size of a head, here and below
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    # one size for all: scores are added up alike
    "exact_attention_fwd": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "exact_attention_bwd_dq": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "exact_attention_select": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "exact_attention_bwd_dkdv": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_delta": {
        ANY: {"BLOCK_M": 64},
    },
    "flash_attention_bwd_dq": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_dkdv": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_dkdv_listed": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_decode": {
        ANY: {"BLOCK_N": 32},
    },
    "flash_attention_decode_merge": {
        ANY: {},
    },
}
