"""Tiles of the kernels over chosen blocks, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, FLOAT32, Table, register_tiles

CPU: Table = {
    "selected_blocks_fwd_rows": {  # the size of a head, here and below
        ANY: {"BLOCK_N": 64},
    },
}

GPU: Table = {
    "selected_blocks_fwd_rows": {  # the size of a head, and FLOAT32 more of float32
        128: {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        256: {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        ANY: {"BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
}

register_tiles(cpu=CPU, gpu=GPU)
