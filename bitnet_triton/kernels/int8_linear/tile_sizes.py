"""Tiles of the kernels of int8_linear, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
    "split_activations_fwd": {
        1024: {"BLOCK_K": 1024},
        4096: {"BLOCK_K": 4096},
        8192: {"BLOCK_K": 8192},
        32768: {"BLOCK_K": 32768},
    },
    "int8_linear_fwd": {
        1: {"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 8192},
        2: {"BLOCK_M": 2, "BLOCK_N": 128, "BLOCK_K": 8192},
        # four tokens are eight vectors: the most that one pass over the rows takes
        32: {"BLOCK_M": 4, "BLOCK_N": 128, "BLOCK_K": 8192},
        ANY: {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 512},
    },
    "int8_linear_topk_fwd": {
        1: {"BLOCK_M": 1, "BLOCK_N": 128, "BLOCK_K": 8192},
        2: {"BLOCK_M": 2, "BLOCK_N": 128, "BLOCK_K": 8192},
        # four tokens are eight vectors: the most that one pass over the rows takes
        32: {"BLOCK_M": 4, "BLOCK_N": 128, "BLOCK_K": 8192},
        ANY: {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 512},
    },
}

GPU: Table = {
    "split_activations_fwd": {  # the length of a row
        4096: {"BLOCK_K": 4096, "num_warps": 4},
        8192: {"BLOCK_K": 8192, "num_warps": 8},
        32768: {"BLOCK_K": 32768, "num_warps": 16},
    },
    "int8_linear_fwd": {
        8: {"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        ANY: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    "int8_linear_topk_fwd": {
        8: {"BLOCK_M": 8, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        ANY: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
}

# What is not as on other NVIDIA GPUs, where shared memory is smaller and there is no wgmma
SM_90: Table = {
    "int8_linear_fwd": {
        4: {"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        **GPU["int8_linear_fwd"],
    },
    "int8_linear_topk_fwd": {
        4: {"BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3},
        **GPU["int8_linear_topk_fwd"],
    },
}

register_tiles(cpu=CPU, gpu=GPU, sm_90=SM_90)
