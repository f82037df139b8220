"""Tiles of the kernel of attention_mass, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, FLOAT32, Table, Tiles, register_tiles

# The loop of flash_attention_bwd_dkdv with one product instead of four: its tiles fit here too
_MASS: dict[int, Tiles] = {
    128: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    256: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    FLOAT32 + 128: {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}

CPU: Table = {
    "attention_mass_fwd": {ANY: {"BLOCK_M": 128, "BLOCK_N": 128}},
    "attention_mass_decode": {ANY: {"BLOCK_N": 32}},
}
GPU: Table = {
    "attention_mass_fwd": _MASS,
    "attention_mass_decode": {ANY: {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1}},
}

register_tiles(cpu=CPU, gpu=GPU)
