"""Tiles of the kernels of quantised_attention (``runtime/autotune.py`` chooses)."""

from __future__ import annotations

from bitnet_triton.runtime.autotune import ANY, Table, register_tiles

CPU: Table = {
    "quantised_attention_fwd": {ANY: {}},
    "quantised_attention_merge": {ANY: {}},
}
GPU: Table = {
    "quantised_attention_fwd": {ANY: {"num_warps": 4, "num_stages": 1}},
    "quantised_attention_merge": {ANY: {"num_warps": 4}},
}

register_tiles(cpu=CPU, gpu=GPU)
