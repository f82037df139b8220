"""Tiles of the rotation, by the size of what is rotated (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {"hadamard_fwd": {ANY: {"BLOCK_M": 16, "BLOCK_K": 64}}}
GPU: Table = {
    "hadamard_fwd": {ANY: {"BLOCK_M": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}}
}

register_tiles(cpu=CPU, gpu=GPU)
