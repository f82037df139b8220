"""Tiles of the kernels over chosen blocks, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, FLOAT32, Table, Tiles, register_tiles

CPU: Table = {
    "selected_blocks_fwd_rows": {  # the size of a head, here and below
        ANY: {"BLOCK_N": 64},
    },
    "selected_blocks_order": {  # entries of a list
        ANY: {"BLOCK_T": 16},
    },
    # groups of tokens by key block: for CPUs alone
    "selected_blocks_fwd": {
        ANY: {"BLOCK_M": 16, "BLOCK_N": 64},
    },
    # dense tiles with a mask: for CPUs alone
    "selected_blocks_fwd_masked": {
        ANY: {"BLOCK_M": 64, "BLOCK_N": 64},
    },
    "selected_blocks_bwd_dq": {
        ANY: {"BLOCK_M": 16, "BLOCK_N": 64},
    },
    "selected_blocks_bwd_dq_rows": {
        ANY: {"BLOCK_N": 64},
    },
    "selected_blocks_bwd_dkdv": {
        ANY: {"BLOCK_M": 64, "BLOCK_N": 64},
    },
    "selected_blocks_bwd_sum": {
        ANY: {"BLOCK_N": 16},
    },
}

_DKDV: dict[int, Tiles] = {
    128: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    256: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}
_ROWS_FLOAT32: dict[int, Tiles] = {
    FLOAT32 + 64: {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
}

GPU: Table = {
    "selected_blocks_fwd_rows": {  # the size of a head, and FLOAT32 more of float32, here and below
        128: {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        256: {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        **_ROWS_FLOAT32,
    },
    "selected_blocks_order": {
        # other sets spill on one NVIDIA target or another
        ANY: {"BLOCK_T": 16, "num_warps": 1},
    },
    "selected_blocks_bwd_dq_rows": {
        128: {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        256: {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        **_ROWS_FLOAT32,
        # tiles of 16 keys spill on one NVIDIA target or another, with any number of warps
        FLOAT32 + 128: {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    },
    "selected_blocks_bwd_dkdv": _DKDV,
    "selected_blocks_bwd_sum": {
        ANY: {"BLOCK_N": 16, "num_warps": 4},
    },
}

# tiles of keys that wait in shared memory, of which gfx942 has 64 KB
_ROWS_HIP: dict[int, Tiles] = {
    128: {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    256: {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    **_ROWS_FLOAT32,
}

HIP: Table = {
    "selected_blocks_fwd_rows": _ROWS_HIP,
    "selected_blocks_bwd_dq_rows": _ROWS_HIP,
    "selected_blocks_bwd_dkdv": {
        **_DKDV,
        128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    },
}

register_tiles(cpu=CPU, gpu=GPU, hip=HIP)
