"""Tiles of the kernels of linear attention, by shape class (``runtime/autotune.py`` chooses).

All kernels of a call share BLOCK_T, the tokens of a chunk: it stands with ``linear_attention_sums``
of the size of a head, which is asked first.
"""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
    "linear_attention_pairs": {  # the size of a head, here and below
        ANY: {"BLOCK_T": 64, "BLOCK_D": 128},
    },
    "linear_attention_sums": {
        ANY: {"BLOCK_T": 64, "BLOCK_N": 64},
    },
    "linear_attention_states": {
        ANY: {"BLOCK_T": 64, "BLOCK_D": 128, "BLOCK_V": 128},
    },
    "linear_attention_out": {
        ANY: {"BLOCK_T": 64, "BLOCK_D": 128, "BLOCK_V": 128},
    },
    "linear_attention_bwd_states": {
        ANY: {"BLOCK_T": 64, "BLOCK_D": 128, "BLOCK_V": 128},
    },
    "linear_attention_bwd_pairs": {
        ANY: {"BLOCK_T": 64, "BLOCK_V": 128},
    },
    "linear_attention_bwd_keys": {
        ANY: {"BLOCK_T": 64, "BLOCK_D": 128, "BLOCK_V": 128},
    },
    "linear_attention_decode": {
        ANY: {"BLOCK_V": 32},
    },
    "project_row": {ANY: {"BLOCK_N": 16, "BLOCK_K": 64}},
    "gating": {ANY: {}},
    "short_convolution": {ANY: {}},
    "gated_norm": {ANY: {}},
    "plain_features": {ANY: {"BLOCK_F": 16}},
    "normalise": {ANY: {}},
}

_WIDE = {"BLOCK_T": 32, "num_warps": 4, "num_stages": 1}
_NARROW = {"BLOCK_T": 16, "num_warps": 4, "num_stages": 1}

GPU: Table = {
    "linear_attention_sums": {  # the size of a head, and FLOAT32 more of float32, here and below
        128: {"BLOCK_T": 32, "BLOCK_N": 32, "num_warps": 4},
        ANY: {"BLOCK_T": 16, "BLOCK_N": 32, "num_warps": 4},
    },
    "linear_attention_pairs": {
        128: {**_WIDE, "BLOCK_D": 32},
        ANY: {**_NARROW, "BLOCK_D": 16},
    },
    "linear_attention_states": {
        128: {**_WIDE, "BLOCK_D": 32, "BLOCK_V": 32},
        ANY: {**_NARROW, "BLOCK_D": 32, "BLOCK_V": 32},
    },
    "linear_attention_out": {
        128: {**_WIDE, "BLOCK_D": 32, "BLOCK_V": 32},
        ANY: {**_NARROW, "BLOCK_D": 16, "BLOCK_V": 16},
    },
    "linear_attention_bwd_states": {
        128: {**_WIDE, "BLOCK_D": 32, "BLOCK_V": 32},
        ANY: {**_NARROW, "BLOCK_D": 16, "BLOCK_V": 16},
    },
    "linear_attention_bwd_pairs": {
        128: {**_WIDE, "BLOCK_V": 32},
        ANY: {**_NARROW, "BLOCK_V": 16},
    },
    "linear_attention_bwd_keys": {
        128: {**_WIDE, "BLOCK_D": 16, "BLOCK_V": 32},
        ANY: {**_NARROW, "num_warps": 8, "BLOCK_D": 32, "BLOCK_V": 32},
    },
    "linear_attention_decode": {  # features of a key
        256: {"BLOCK_V": 16, "num_warps": 4, "num_stages": 1},
        ANY: {"BLOCK_V": 8, "num_warps": 8, "num_stages": 1},
    },
    "project_row": {ANY: {"BLOCK_N": 8, "BLOCK_K": 256, "num_warps": 4}},
    "gating": {ANY: {"num_warps": 4}},
    "short_convolution": {ANY: {"num_warps": 4}},
    "gated_norm": {ANY: {"num_warps": 4}},
    "plain_features": {ANY: {"BLOCK_F": 16, "num_warps": 4}},
    "normalise": {ANY: {"num_warps": 4}},
}

register_tiles(cpu=CPU, gpu=GPU)
