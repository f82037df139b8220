"""Tiles of the kernels of bit_linear, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
    # the largest tiles of each class: ``fitted_tiles`` makes them smaller for smaller matrices
    "bit_linear_fwd": {
        ANY: {"BLOCK_M": 512, "BLOCK_N": 128, "BLOCK_K": 512, "TOKENS_LEFT": True},
    },
    "bit_linear_bwd_dx": {
        ANY: {"BLOCK_M": 512, "BLOCK_N": 256, "BLOCK_K": 256, "TOKENS_LEFT": True},
    },
    "bit_linear_bwd_dweight": {
        ANY: {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 512, "FROM_CODES": False},
    },
    "bit_linear_bwd_dequantize": {
        ANY: {"BLOCK_M": 64, "BLOCK_K": 64},
    },
    # as on GPUs, which alone launch these: the tests run them on a CPU
    "bit_linear_fwd_from_codes": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8},
    },
    "bit_linear_codes": {
        ANY: {"BLOCK": 4096},
    },
    "bit_linear_bwd_scale": {
        ANY: {"BLOCK_M": 4, "BLOCK_K": 512},
    },
}

GPU: Table = {
    "bit_linear_fwd": {  # for few tokens: more take the kernel from codes
        256: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    },
    "bit_linear_fwd_from_codes": {
        ANY: {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 128,
            "GROUP": 8,
            "num_warps": 8,
            "num_stages": 3,
        },
    },
    "bit_linear_codes": {  # the number of elements
        ANY: {"BLOCK": 4096, "num_warps": 8},
    },
    "bit_linear_bwd_scale": {
        ANY: {"BLOCK_M": 4, "BLOCK_K": 512, "num_warps": 4},
    },
    "bit_linear_bwd_dx": {
        ANY: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    },
    "bit_linear_bwd_dweight": {
        ANY: {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2},
    },
    "bit_linear_bwd_dweight_float32": {
        ANY: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    },
}

# What is not as on other NVIDIA GPUs, where shared memory is smaller and there is no wgmma
SM_90: Table = {
    "bit_linear_fwd": {
        256: {"BLOCK_M": 256, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    "bit_linear_fwd_from_codes": {
        # of a plain int8 product: 1.02 POPS for 2048 tokens, 2560 -> 6912
        ANY: {
            "BLOCK_M": 128,
            "BLOCK_N": 128,
            "BLOCK_K": 128,
            "GROUP": 8,
            "num_warps": 4,
            "num_stages": 3,
        },
    },
}

register_tiles(cpu=CPU, gpu=GPU, sm_90=SM_90)
