"""Tiles of the kernels over buckets, by shape class (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
    "lsh_attention_fwd": {ANY: {"BLOCK_M": 64, "BLOCK_N": 64}},
    "lsh_attention_bwd_dq": {ANY: {"BLOCK_M": 64, "BLOCK_N": 64}},
    "lsh_attention_bwd_dkdv": {ANY: {"BLOCK_M": 64, "BLOCK_N": 64}},
    "lsh_attention_bwd_rows": {ANY: {"BLOCK_M": 16}},
}

# none for GPUs yet: the sets that were tried spill on one target or another
register_tiles(cpu=CPU)
