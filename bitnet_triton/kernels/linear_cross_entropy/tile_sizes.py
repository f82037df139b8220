"""Tiles of the kernels of linear_cross_entropy (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
    "linear_cross_entropy_fwd": {ANY: {"BLOCK_V": 1024}},
    "linear_cross_entropy_bwd": {ANY: {"BLOCK_V": 1024}},
}

GPU: Table = {
    "linear_cross_entropy_fwd": {ANY: {"BLOCK_V": 4096, "num_warps": 8}},
    "linear_cross_entropy_bwd": {ANY: {"BLOCK_V": 4096, "num_warps": 8}},
}

register_tiles(cpu=CPU, gpu=GPU)
