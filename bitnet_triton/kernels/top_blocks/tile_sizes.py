"""Tiles of the kernels of top_blocks, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, FLOAT32, Table, register_tiles

CPU: Table = {
    "top_blocks_fwd": {  # the size of a head
        ANY: {"BLOCK_M": 64, "BLOCK_N": 128, "UNITS_FIRST": True},
    },
    "top_blocks_merge": {
        ANY: {},
    },
    # of one token or a few: for CPUs alone
    "top_blocks_score": {  # the size of a head
        ANY: {"BLOCK_N": 64},
    },
    "top_blocks_score_rows": {  # the size of a head
        ANY: {"BLOCK_M": 64, "BLOCK_N": 128},
    },
    "top_blocks_take": {  # blocks
        ANY: {"BLOCK_J": 512},
    },
    "pool_keys": {
        ANY: {},
    },
    "block_index_step": {
        ANY: {"BLOCK_K": 64},
    },
}

# Queries are rows of the products: units as rows would spill
_WIDE = {"UNITS_FIRST": False, "num_warps": 8}
_NARROW = {"UNITS_FIRST": False, "num_warps": 4}

GPU: Table = {
    "top_blocks_fwd": {  # the size of a head, and FLOAT32 more of float32
        64: {**_WIDE, "BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 2},
        128: {**_WIDE, "BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 2},
        256: {**_WIDE, "BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1},
        FLOAT32 + 64: {**_WIDE, "BLOCK_M": 32, "BLOCK_N": 16, "num_stages": 1},
        FLOAT32 + 128: {**_WIDE, "BLOCK_M": 16, "BLOCK_N": 16, "num_stages": 1},
    },
    "top_blocks_merge": {  # the number of candidates
        ANY: {"num_warps": 4},
    },
    "pool_keys": {  # the size of a head
        ANY: {"num_warps": 8},
    },
    "block_index_step": {
        ANY: {"BLOCK_K": 64, "num_warps": 8},
    },
}

SM_90: Table = {
    "top_blocks_fwd": {
        **GPU["top_blocks_fwd"],
        FLOAT32 + 64: {**_WIDE, "BLOCK_M": 16, "BLOCK_N": 32, "num_stages": 1},
    },
}

# What spills on gfx942 is not what spills elsewhere
HIP: Table = {
    "top_blocks_fwd": {
        64: {**_NARROW, "BLOCK_M": 16, "BLOCK_N": 32, "num_stages": 1},
        128: {**_WIDE, "BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 2},
        256: {**_WIDE, "BLOCK_M": 16, "BLOCK_N": 32, "num_stages": 1},
        FLOAT32 + 64: {**_WIDE, "BLOCK_M": 32, "BLOCK_N": 16, "num_stages": 1},
        FLOAT32 + 128: {**_WIDE, "BLOCK_M": 16, "BLOCK_N": 16, "num_stages": 1},
    },
}

register_tiles(cpu=CPU, gpu=GPU, sm_90=SM_90, hip=HIP)
