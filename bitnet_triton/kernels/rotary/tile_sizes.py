"""Tiles of the kernels of rotary, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
    "rotary": {ANY: {"BLOCK_H": 1}},
    "rotary_and_store": {ANY: {"BLOCK_H": 1}},
}

GPU: Table = {
    "rotary": {  # the size of a head
        128: {"BLOCK_H": 32, "num_warps": 4},
        ANY: {"BLOCK_H": 8, "num_warps": 4},
    },
    "rotary_and_store": {
        128: {"BLOCK_H": 32, "num_warps": 4},
        ANY: {"BLOCK_H": 8, "num_warps": 4},
    },
}

register_tiles(cpu=CPU, gpu=GPU)
