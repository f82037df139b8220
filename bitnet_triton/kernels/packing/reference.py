"""The 2-bit layout of published BitNet checkpoints, in plain PyTorch.

Four rows share a byte: with R = N / 4, byte row r holds rows r, r + R, r + 2R and r + 3R in bits
0-1, 2-3, 4-5 and 6-7, each as code + 1. The value 3 is invalid.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES_PER_BYTE = 4
_WORD = 8  # bytes


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
    """Tell whether a byte of ``packed`` holds the value 3."""
    # eight bytes at a time, a block of them that fits into a cache: whole checkpoints go through
    flat = packed.reshape(-1)
    flat = flat.clone() if flat.storage_offset() % _WORD else flat
    aligned = flat.numel() // _WORD * _WORD
    blocks = (*flat[:aligned].view(torch.int64).split(2**17), flat[aligned:])
    # a 3 has both bits set: only then does a low bit of a code meet the high bit, shifted by one
    return any(bool((block & (block >> 1) & _low_bits(block)).any()) for block in blocks)


def _low_bits(block: Tensor) -> int:
    return 0x5555555555555555 if block.dtype == torch.int64 else 0x55
