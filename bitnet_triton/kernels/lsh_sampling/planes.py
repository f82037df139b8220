"""The planes that codes are made of: drawn from a seed, the same ones on every device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def hash_planes(D: int, bits: int, tables: int, seed: int, device: torch.device) -> Tensor:
    """Return normals of planes [K L D] in float32, drawn on the CPU whatever the device.

    All heads and layers share them (arXiv:2410.16179, section 4.2): whoever asks again is given the
    same tensor, which nobody writes to.
    """
    # what inference mode makes could not be used outside of it
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(bits, tables, D, generator=generator).to(device)
