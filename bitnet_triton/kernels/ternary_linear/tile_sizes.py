"""Tiles of the kernels of ternary_linear, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
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
    "ternary_linear_bwd": {
        ANY: {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_R": 64},
    },
}

GPU: Table = {
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
        ANY: {
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
        ANY: {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2},
    },
    # here and below: with 64 rows on the left, Triton 3.7 multiplies float32 as TF32 on sm_100,
    # whatever precision is asked for
    "ternary_linear_bwd_float32": {
        ANY: {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2},
    },
}

# What other GPUs have no instruction for
NVIDIA: Table = {
    "ternary_linear_fwd_one": {  # the length of a row
        4096: {"BLOCK_R": 4, "BLOCK_K": 128, "UNROLL": 4, "num_warps": 4},
        ANY: {"BLOCK_R": 2, "BLOCK_K": 512, "UNROLL": 4, "num_warps": 4},
    },
}

# What is not as on other NVIDIA GPUs, where shared memory is smaller and there is no wgmma
SM_90: Table = {
    # two programs of four warps a multiprocessor: a barrier holds up one of them only
    "ternary_linear_fwd": {
        ANY: {
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
        32: GPU["ternary_linear_fwd_few"][32],
        64: GPU["ternary_linear_fwd_few"][64],
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
        32: GPU["ternary_linear_fwd_few"][32],
        64: GPU["ternary_linear_fwd_few"][64],
    },
}

register_tiles(cpu=CPU, gpu=GPU, nvidia=NVIDIA, sm_90=SM_90)
