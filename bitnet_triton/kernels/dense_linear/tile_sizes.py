"""Tiles of the kernels of dense_linear, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import Table, register_tiles

CPU: Table = {
    "dense_linear_fwd": {
        1: {"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 512},
        2: {"BLOCK_M": 2, "BLOCK_N": 128, "BLOCK_K": 512},
        4: {"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 512},
    },
}

register_tiles(cpu=CPU)
