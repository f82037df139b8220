"""Tiles of the kernels of kv_pages, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
    "write_pages": {ANY: {"BLOCK_H": 1}},
    "copy_pages": {ANY: {"BLOCK": 4096}},
}

GPU: Table = {
    "write_pages": {ANY: {"BLOCK_H": 4, "num_warps": 4}},
    "copy_pages": {ANY: {"BLOCK": 2048, "num_warps": 4}},
}

register_tiles(cpu=CPU, gpu=GPU)
