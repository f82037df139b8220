"""Lengths and tables of integers, as kernels read them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def in_a_row(value: Any) -> Any:
    """Return an argument that a kernel reads by its address and a number, without gaps.

    Args:
        value: a tensor, which is copied only if it is a view with strides; others as they are, for
            checks to refuse.
    """
    return value.contiguous() if isinstance(value, Tensor) else value
