"""Tile sizes of the Triton kernels, by op and shape class.

The tables hold configurations that compile without register spills for every target in the
ahead-of-time test; they are chosen on paper, not measured.
"""

from __future__ import annotations

Tiles = dict[str, int]

# Rows of activations in one program: few for decoding, many for prefill and training
_FEW_ROWS = 32

_TABLES: dict[str, dict[str, Tiles]] = {
    "ternary_linear_fwd": {
        "few": {"BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
        "many": {"BLOCK_M": 64, "BLOCK_R": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    },
    "ternary_linear_fwd_row": {
        "few": {"BLOCK_R": 4, "BLOCK_K": 512, "num_warps": 4, "num_stages": 2},
    },
    "ternary_linear_bwd": {
        "many": {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 2},
    },
    "bit_linear_fwd": {
        "many": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    },
    "bit_linear_bwd_dx": {
        "many": {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
    },
    "bit_linear_bwd_dweight": {
        "many": {"BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_M": 32, "num_warps": 4, "num_stages": 2},
    },
}


def tiles(op: str, rows: int) -> Tiles:
    """Return block sizes, ``num_warps`` and ``num_stages`` of a kernel.

    Args:
        op: name of the kernel without ``_kernel``.
        rows: number of rows of activations.
    """
    table = _TABLES[op]
    few = "few" in table and (rows <= _FEW_ROWS or "many" not in table)
    return dict(table["few" if few else "many"])


def all_tiles(op: str) -> dict[str, Tiles]:
    """Return every configuration of a kernel that can be launched, by shape class."""
    return {name: dict(config) for name, config in _TABLES[op].items()}

