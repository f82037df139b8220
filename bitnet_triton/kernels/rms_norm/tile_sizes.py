"""Tiles of the kernels of rms_norm, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import Table, register_tiles

CPU: Table = {
    "rms_norm_fwd": {
        1024: {"BLOCK_D": 1024},
        4096: {"BLOCK_D": 4096},
        16384: {"BLOCK_D": 16384},
    },
    "rms_norm_bwd": {
        1024: {"BLOCK_D": 1024},
        4096: {"BLOCK_D": 4096},
        16384: {"BLOCK_D": 16384},
    },
    "rms_norm_quantize_fwd": {
        1024: {"BLOCK_D": 1024},
        4096: {"BLOCK_D": 4096},
        16384: {"BLOCK_D": 16384},
    },
    "relu2_mul_norm_quantize_fwd": {
        1024: {"BLOCK_F": 1024},
        8192: {"BLOCK_F": 8192},
        16384: {"BLOCK_F": 16384},
    },
    "silu_mul_quantize_fwd": {
        1024: {"BLOCK_F": 1024},
        8192: {"BLOCK_F": 8192},
        16384: {"BLOCK_F": 16384},
    },
}

GPU: Table = {
    "rms_norm_fwd": {  # the length of a row, here and below
        1024: {"BLOCK_D": 1024, "num_warps": 4},
        4096: {"BLOCK_D": 4096, "num_warps": 8},
        16384: {"BLOCK_D": 16384, "num_warps": 16},
    },
    "rms_norm_bwd": {
        1024: {"BLOCK_D": 1024, "num_warps": 4},
        4096: {"BLOCK_D": 4096, "num_warps": 8},
        16384: {"BLOCK_D": 16384, "num_warps": 16},
    },
    "rms_norm_quantize_fwd": {
        1024: {"BLOCK_D": 1024, "num_warps": 4},
        4096: {"BLOCK_D": 4096, "num_warps": 8},
        16384: {"BLOCK_D": 16384, "num_warps": 16},
    },
    "relu2_mul_norm_quantize_fwd": {
        1024: {"BLOCK_F": 1024, "num_warps": 4},
        8192: {"BLOCK_F": 8192, "num_warps": 8},
        16384: {"BLOCK_F": 16384, "num_warps": 16},
    },
    "silu_mul_quantize_fwd": {
        1024: {"BLOCK_F": 1024, "num_warps": 4},
        8192: {"BLOCK_F": 8192, "num_warps": 8},
        # twice as long spills with any number of warps
        16384: {"BLOCK_F": 16384, "num_warps": 16},
    },
}

register_tiles(cpu=CPU, gpu=GPU)
