"""Arguments that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def parse_dtype(name: str) -> torch.dtype:
    """Turn the value of ``--dtype`` into a dtype.

    Raises:
        ValueError: torch has no floating-point dtype of that name.
    """
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`--dtype`: expected float32, bfloat16 or float16, got {name!r}")
    return dtype
