"""Tiles of the kernels of native_sparse, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, FLOAT32, Table, Tiles, register_tiles

CPU: Table = {
    "compress_blocks_fwd": {ANY: {"BLOCK_N": 32}},
    "compress_blocks_bwd_dx": {ANY: {"BLOCK_N": 32}},
    "compress_blocks_bwd_dw": {ANY: {"BLOCK_N": 32}},
    "compressed_attention_fwd": {  # the size of a head, here and below
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128, "ROWS": 8},
    },
    "compressed_attention_fwd_choice": {  # without attention
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128, "ROWS": 8},
    },
    "compressed_attention_bwd_dq": {ANY: {"BLOCK_M": 128, "BLOCK_N": 128}},
    "compressed_attention_bwd_dkdv": {ANY: {"BLOCK_M": 128, "BLOCK_N": 128}},
    "compressed_attention_decode": {ANY: {"BLOCK_N": 64}},
    "compressed_attention_take": {ANY: {"BLOCK_C": 128}},
    "compress_step": {ANY: {}},
    "sparse_gates": {ANY: {"BLOCK_N": 16, "BLOCK_K": 64}},
    "gated_sum_fwd": {ANY: {"BLOCK_M": 16}},
    "gated_sum_bwd": {ANY: {"BLOCK_M": 16}},
}

_BACKWARD: dict[int, Tiles] = {
    128: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    256: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}

GPU: Table = {
    "compress_blocks_fwd": {ANY: {"BLOCK_N": 16, "num_warps": 4}},
    "compress_blocks_bwd_dx": {ANY: {"BLOCK_N": 16, "num_warps": 8}},
    "compress_blocks_bwd_dw": {ANY: {"BLOCK_N": 16, "num_warps": 4}},
    "compressed_attention_fwd": {
        64: {"BLOCK_M": 16, "BLOCK_N": 64, "ROWS": 4, "num_warps": 8, "num_stages": 1},
        128: {"BLOCK_M": 16, "BLOCK_N": 64, "ROWS": 16, "num_warps": 8, "num_stages": 1},
        256: {"BLOCK_M": 16, "BLOCK_N": 16, "ROWS": 4, "num_warps": 8, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_M": 16, "BLOCK_N": 16, "ROWS": 4, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "ROWS": 4, "num_warps": 4, "num_stages": 1},
    },
    "compressed_attention_fwd_choice": {
        128: {"BLOCK_M": 16, "BLOCK_N": 64, "ROWS": 4, "num_warps": 8, "num_stages": 1},
        256: {"BLOCK_M": 16, "BLOCK_N": 32, "ROWS": 4, "num_warps": 8, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "ROWS": 4, "num_warps": 8, "num_stages": 1},
    },
    "compressed_attention_bwd_dq": {
        128: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        256: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "compressed_attention_bwd_dkdv": _BACKWARD,
    "compressed_attention_decode": {
        128: {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        256: {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    },
    "compressed_attention_take": {ANY: {"BLOCK_C": 1024, "num_warps": 8}},
    "compress_step": {ANY: {"num_warps": 4}},
    "sparse_gates": {ANY: {"BLOCK_N": 8, "BLOCK_K": 256, "num_warps": 4}},
    "gated_sum_fwd": {ANY: {"BLOCK_M": 16, "num_warps": 4}},
    "gated_sum_bwd": {ANY: {"BLOCK_M": 16, "num_warps": 4}},
}

# What is not as on other NVIDIA GPUs, whose registers spill
SM_90: Table = {
    "compressed_attention_fwd": {
        **GPU["compressed_attention_fwd"],
        128: {"BLOCK_M": 32, "BLOCK_N": 64, "ROWS": 32, "num_warps": 8, "num_stages": 1},
    },
}

# What is not as on NVIDIA, where registers and shared memory are others
HIP: Table = {
    "compressed_attention_bwd_dkdv": {
        **_BACKWARD,
        128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    },
    "compressed_attention_fwd": {
        **GPU["compressed_attention_fwd"],
        64: {"BLOCK_M": 32, "BLOCK_N": 32, "ROWS": 32, "num_warps": 4, "num_stages": 1},
        128: {"BLOCK_M": 32, "BLOCK_N": 32, "ROWS": 32, "num_warps": 4, "num_stages": 1},
    },
}

register_tiles(cpu=CPU, gpu=GPU, sm_90=SM_90, hip=HIP)
