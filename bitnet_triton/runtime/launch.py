"""Start a Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return a callable that starts ``kernel`` over ``grid``; launchers use it for every kernel."""
    return kernel[grid]
