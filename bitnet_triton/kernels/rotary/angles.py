"""Angles of rotary embeddings that stay right at millions of tokens."""

import math

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Return positions times frequencies, less whole turns.

    Formed in float64: float32 is off by 0.09 rad at two million tokens, and by then no longer a
    matter of distance alone.

    Args:
        positions: integers [..], or steps backward where negative.
        inv_freq: angles of one position, [D / 2], or what positions [.. 1] broadcast with.

    Returns:
        float32 [.. D / 2] in [0, 2 pi).
    """
    angles = positions[..., None].double() * inv_freq.double()
    return torch.remainder(angles, 2 * math.pi).float()
