"""Tiles of the kernels of exact_attention, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, FLOAT32, Table, Tiles, register_tiles

CPU: Table = {
    # one size for all: scores are added up alike
    "exact_attention_fwd": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "exact_attention_bwd_dq": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "exact_attention_select": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
    "exact_attention_bwd_dkdv": {
        ANY: {"BLOCK_M": 128, "BLOCK_N": 128},
    },
}

# Forward and dq where rows select by scores: as large as fits beside what the selection needs
_SELECTED: dict[int, Tiles] = {
    256: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    FLOAT32 + 64: {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
}

# As flash_attention has them for keys or rows from a list
_DKDV: dict[int, Tiles] = {
    128: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    256: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}

GPU: Table = {
    "exact_attention_fwd": {
        # with 16 keys, heads of 128 values have 8 bytes of local memory on sm_120
        128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        **_SELECTED,
    },
    "exact_attention_bwd_dq": _SELECTED,
    "exact_attention_select": {
        256: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 64: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "exact_attention_bwd_dkdv": _DKDV,
}

# What is not as on NVIDIA: larger tiles spill on gfx942, or exceed its 64 KB of shared memory
HIP: Table = {
    "exact_attention_fwd": _SELECTED,
    "exact_attention_bwd_dkdv": {
        **_DKDV,
        128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    },
}

register_tiles(cpu=CPU, gpu=GPU, hip=HIP)
