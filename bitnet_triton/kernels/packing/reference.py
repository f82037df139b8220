"""The 2-bit layout of published BitNet checkpoints, in plain PyTorch.

Four rows share a byte: with R = N / 4, byte row r holds rows r, r + R, r + 2R and r + 3R in bits
0-1, 2-3, 4-5 and 6-7, each as code + 1. The value 3 is invalid.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES_PER_BYTE = 4


def pack_codes(codes: Tensor) -> Tensor:
    """Pack int8 codes [N, K] in -1..1 into uint8 [N / 4, K]; N is a multiple of 4."""
    planes = (codes + 1).to(torch.uint8).chunk(CODES_PER_BYTE)
    packed = torch.zeros_like(planes[0])
    for j, plane in enumerate(planes):
        packed |= plane << (2 * j)
    return packed


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack uint8 [N / 4, K] into int8 codes [N, K]."""
    planes = [(packed >> (2 * j)) & 3 for j in range(CODES_PER_BYTE)]
    return torch.cat(planes).to(torch.int8) - 1


def has_invalid_code(packed: Tensor) -> bool:
    """Tell whether a byte of ``packed`` holds the value 3, a block of rows at a time."""
    # both bits of a code set: only then does the byte share a low bit with itself shifted by one
    return any(
        bool((rows & (rows >> 1) & 0b01010101).any())
        for rows in packed.split(max(1, 2**20 // max(1, packed.shape[-1])))
    )
