"""Tiles of the kernels of quantize, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
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
}

GPU: Table = {
    "quantize_activations_fwd": {  # the length of a row
        1024: {"BLOCK_K": 1024, "num_warps": 4},
        4096: {"BLOCK_K": 4096, "num_warps": 4},
        8192: {"BLOCK_K": 8192, "num_warps": 8},
        32768: {"BLOCK_K": 32768, "num_warps": 16},
    },
    "weight_sums_fwd": {  # the number of elements
        ANY: {"BLOCK": 4096, "BLOCKS": 8, "num_warps": 8},
    },
    "weight_stats_fwd": {  # the number of programs of the kernel before it
        ANY: {"BLOCK": 1024, "num_warps": 4},
    },
}

register_tiles(cpu=CPU, gpu=GPU)
