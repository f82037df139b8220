"""Tiles of the kernels of flash_attention, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, FLOAT32, Table, Tiles, register_tiles

CPU: Table = {
    "flash_attention_fwd": {  # the size of a head, here and below
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_delta": {
        ANY: {"BLOCK_M": 64},
    },
    "flash_attention_bwd_dq": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_dkdv": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_bwd_dkdv_listed": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "flash_attention_decode": {
        ANY: {"BLOCK_N": 32},
    },
    "flash_attention_decode_pattern": {
        ANY: {"BLOCK_N": 32},
    },
    "flash_attention_decode_merge": {
        ANY: {},
    },
    # of pages, a tile has at most the keys of one
    "flash_attention_paged": {  # ROWS: of a tile, at least
        ANY: {"ROWS": 1, "BLOCK_N": 32},
    },
    "flash_attention_paged_many": {
        ANY: {"ROWS": 128, "BLOCK_N": 128},
    },
    "flash_attention_paged_merge": {
        ANY: {},
    },
}

# Also where it takes keys or rows from a list
_DKDV: dict[int, Tiles] = {
    128: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    256: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}
_DKDV_HIP: dict[int, Tiles] = {
    128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
}

GPU: Table = {
    "flash_attention_fwd": {  # the size of a head, and FLOAT32 more of float32, here and below
        # a tile of keys serves 128 queries: with 64, the second-level cache would be the limit
        128: {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        256: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_bwd_delta": {
        ANY: {"BLOCK_M": 32, "num_warps": 8},
    },
    "flash_attention_bwd_dq": {
        128: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        256: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_bwd_dkdv": _DKDV,
    "flash_attention_bwd_dkdv_listed": _DKDV,
    "flash_attention_decode": {
        # with fewer warps, float32 heads of 128 values spill on sm_90
        ANY: {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    },
    "flash_attention_decode_pattern": {
        128: {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        256: {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        ANY: {"BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "flash_attention_decode_merge": {
        ANY: {"num_warps": 4},
    },
    "flash_attention_paged": {
        128: {"ROWS": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        256: {"ROWS": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
        FLOAT32 + 64: {"ROWS": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
        ANY: {"ROWS": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    },
    "flash_attention_paged_many": {
        128: {"ROWS": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        256: {"ROWS": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        FLOAT32 + 64: {"ROWS": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"ROWS": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    },
    "flash_attention_paged_merge": {
        ANY: {"num_warps": 4},
    },
}

# What is not as on other NVIDIA GPUs, where shared memory is smaller and there is no wgmma
SM_90: Table = {
    "flash_attention_fwd": {
        **GPU["flash_attention_fwd"],
        64: {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    },
    "flash_attention_bwd_dq": {
        **GPU["flash_attention_bwd_dq"],
        64: {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    },
    "flash_attention_bwd_dkdv": {
        **_DKDV,
        64: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    },
    "flash_attention_decode": {
        128: {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        **GPU["flash_attention_decode"],
    },
}

# What is not as on NVIDIA: larger tiles spill on gfx942, or exceed its 64 KB of shared memory
HIP: Table = {
    "flash_attention_fwd": {
        **GPU["flash_attention_fwd"],
        128: {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_bwd_dq": {
        **GPU["flash_attention_bwd_dq"],
        128: {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_decode_pattern": {
        ANY: {"BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "flash_attention_paged_many": {
        **GPU["flash_attention_paged_many"],
        128: {"ROWS": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    "flash_attention_bwd_dkdv": {**_DKDV, **_DKDV_HIP},
    "flash_attention_bwd_dkdv_listed": {**_DKDV, **_DKDV_HIP},
}

register_tiles(cpu=CPU, gpu=GPU, sm_90=SM_90, hip=HIP)
