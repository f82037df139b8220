"""Tiles of the kernels of best, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
    "merge_best": {ANY: {"BLOCK_C": 1024}},
}

GPU: Table = {
    "merge_best": {  # the number of candidates
        ANY: {"BLOCK_C": 1024, "num_warps": 4},
    },
}

register_tiles(cpu=CPU, gpu=GPU)
