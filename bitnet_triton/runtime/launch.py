"""Start a Triton kernel, or only write down that it would start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded: what ``kernel[grid](*args, **options)`` would have run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("bitnet_triton_recorded", default=None)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return a callable that starts ``kernel`` over ``grid``; launchers use it for every kernel."""
    recorded = _recorded.get()
    if recorded is None:
        return kernel[grid]

    def record(*args: Any, **options: Any) -> None:
        recorded.append(Launch(kernel, grid, args, options))

    return record


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches inside the block and start none; outputs stay uninitialised.

    Launchers can then be called with tensors on the meta device, which tells the ahead-of-time
    compilation (``runtime/aot.py``) every signature, tile size and specialisation in use.
    """
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
