"""Tiles of the kernels of lsh_sampling, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, FLOAT32, Table, register_tiles

CPU: Table = {
    # of the queries of a step there are few
    "lsh_hash": {64: {"BLOCK_M": 128, "BLOCK_L": 32}, ANY: {"BLOCK_M": 128, "BLOCK_L": 64}},
    "lsh_mean_direction": {ANY: {}},
    "lsh_build": {ANY: {"BLOCK_N": 32, "BLOCK_W": 128}},
    "lsh_probe": {
        ANY: {
            "LISTS": 2,
            "BLOCK_N": 1,
            "BLOCK_T": 128,
            "BLOCK_C": 1024,
            "AHEAD": 8,
            "LINES": 8,
        },
    },
    "lsh_gather": {ANY: {"BLOCK_N": 16, "AHEAD": 16}},
    "sign_scores": {ANY: {"BLOCK_N": 1024}},
    "verified_draw": {ANY: {"BLOCK_N": 32, "BLOCK_J": 64, "BLOCK_C": 1024}},
}

GPU: Table = {
    "lsh_hash": {
        ANY: {"BLOCK_M": 32, "BLOCK_L": 16, "num_warps": 4, "num_stages": 1},
    },
    "lsh_mean_direction": {ANY: {"num_warps": 4}},
    "lsh_build": {ANY: {"BLOCK_N": 32, "BLOCK_W": 1024, "num_warps": 4, "num_stages": 1}},
    "lsh_probe": {
        ANY: {
            "LISTS": 1,
            "BLOCK_N": 128,
            "BLOCK_T": 256,
            "BLOCK_C": 1024,
            "AHEAD": 0,
            "LINES": 1,
            "num_warps": 4,
            "num_stages": 1,
        },
    },
    "lsh_gather": {
        64: {"BLOCK_N": 32, "AHEAD": 0, "num_warps": 4, "num_stages": 1},
        128: {"BLOCK_N": 32, "AHEAD": 0, "num_warps": 8, "num_stages": 1},
        256: {"BLOCK_N": 16, "AHEAD": 0, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_N": 16, "AHEAD": 0, "num_warps": 4, "num_stages": 1},
        ANY: {"BLOCK_N": 16, "AHEAD": 0, "num_warps": 8, "num_stages": 1},
    },
    "sign_scores": {ANY: {"BLOCK_N": 512, "num_warps": 4, "num_stages": 1}},
    "verified_draw": {
        ANY: {"BLOCK_N": 16, "BLOCK_J": 256, "BLOCK_C": 1024, "num_warps": 4, "num_stages": 1},
    },
}

register_tiles(cpu=CPU, gpu=GPU)
