"""Argument checks that name the argument, what it wants and what it got."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}`: expected a torch.Tensor, got {type(value).__name__}")


def check_shape(name: str, value: Tensor, dims: str, **sizes: int) -> None:
    """Raise ``ValueError`` unless ``value`` has the dimensions ``dims``.

    Args:
        name: the argument's name.
        value: the tensor.
        dims: letters divided by spaces, e.g. ``"N K"``; those in ``sizes`` must have that size.
        **sizes: size of each dimension that is known.
    """
    letters = dims.split()
    fits = value.ndim == len(letters) and all(
        sizes.get(letter, size) == size for letter, size in zip(letters, value.shape)
    )
    if not fits:
        known = ", ".join(f"{letter}={size}" for letter, size in sizes.items() if letter in letters)
        wanted = f"[{' '.join(letters)}]" + (f" with {known}" if known else "")
        raise ValueError(f"`{name}`: expected {wanted}, got {list(value.shape)}")


def check_dtype(name: str, value: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ``TypeError`` unless ``value`` has one of ``dtypes``."""
    if value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"`{name}`: expected dtype {wanted}, got {got}")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise ``ValueError`` unless ``value`` is on ``device``."""
    if value.device != device:
        raise ValueError(f"`{name}`: expected a tensor on {device}, got one on {value.device}")


def check_matrix(name: str, value: Tensor, dims: str = "N K") -> None:
    """Raise ``ValueError`` unless ``value`` is a matrix that is not empty."""
    check_shape(name, value, dims)
    if value.numel() == 0:
        raise ValueError(f"`{name}`: expected [{dims}], each at least 1, got {list(value.shape)}")
