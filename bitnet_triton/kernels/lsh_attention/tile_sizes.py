"""Tiles of the kernels over buckets, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, FLOAT32, Table, Tiles, register_tiles

CPU: Table = {
    "lsh_attention_fwd": {ANY: {"BLOCK_M": 64, "BLOCK_N": 64}},
    "lsh_attention_bwd_dq": {ANY: {"BLOCK_M": 64, "BLOCK_N": 64}},
    "lsh_attention_bwd_dkdv": {ANY: {"BLOCK_M": 64, "BLOCK_N": 64}},
    "lsh_attention_bwd_rows": {ANY: {"BLOCK_M": 16}},
    "lsh_attention_hash": {ANY: {"BLOCK_C": 16}},
    "lsh_attention_list": {ANY: {"BLOCK_N": 128}},
    "lsh_attention_decode": {ANY: {"BLOCK_N": 16}},
}

_TILES: dict[int, Tiles] = {  # the size of a head, and FLOAT32 more of float32, here and below
    128: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    256: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    # others spill on one target or another
    FLOAT32 + 64: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
}

GPU: Table = {
    "lsh_attention_fwd": _TILES | {FLOAT32 + 64: {**_TILES[FLOAT32 + 64], "num_warps": 4}},
    "lsh_attention_bwd_dq": _TILES
    | {64: {**_TILES[128], "BLOCK_M": 16}, 256: {**_TILES[256], "BLOCK_N": 16}},
    "lsh_attention_bwd_dkdv": _TILES | {64: _TILES[128], 128: {**_TILES[128], "BLOCK_M": 16}},
    "lsh_attention_bwd_rows": {ANY: {"BLOCK_M": 16, "num_warps": 4}},
    "lsh_attention_hash": {ANY: {"BLOCK_C": 16, "num_warps": 4}},
    "lsh_attention_list": {ANY: {"BLOCK_N": 128, "num_warps": 4}},
    "lsh_attention_decode": {
        256: {"BLOCK_N": 32, "num_warps": 4},
        ANY: {"BLOCK_N": 16, "num_warps": 4},  # float32: more spill on sm_80
    },
}

register_tiles(cpu=CPU, gpu=GPU)
