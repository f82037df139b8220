"""Choose a backend: forced, else the first that can run. The only place that decides.

An op brings a table of implementations; ``select`` returns the one that runs. Each op logs its
choice once for every device: at INFO when it is the preferred backend, at WARNING with the
objections when it is not.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from bitnet_triton.errors import BackendUnavailableError
from bitnet_triton.runtime.device import compile_objection, triton_objection

logger = logging.getLogger("bitnet_triton")

BACKENDS = ("triton", "compile", "reference")
ENVIRONMENT_VARIABLE = "BITNET_TRITON_BACKEND"

_forced: ContextVar[str | None] = ContextVar("bitnet_triton_backend", default=None)
_logged: set[tuple[str, str, str]] = set()


def _always(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        run: the launcher.
        supports: takes the launcher's arguments, returns an objection or None.
    """

    run: Callable[..., Any]
    supports: Callable[..., str | None] = _always


def _checked(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force ``backend`` inside a ``with`` block, in this thread or task.

    Args:
        backend: "triton", "compile" or "reference". The environment variable
            ``BITNET_TRITON_BACKEND`` does the same for a whole process; the block wins over it.

    Raises:
        ValueError: ``backend`` is none of the three.
        BackendUnavailableError: raised by the ops inside the block when the backend cannot run.
    """
    token = _forced.set(_checked(backend, "`backend`"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """Return the backend that is forced now, or None."""
    backend = _forced.get()
    if backend is not None:
        return backend
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    return _checked(from_environment, ENVIRONMENT_VARIABLE) if from_environment else None


def backend_objection(backend: str, device: torch.device) -> str | None:
    """Say why ``backend`` cannot run on ``device`` at all; None when it can."""
    if backend == "triton":
        return triton_objection(device)
    if backend == "compile":
        return compile_objection(device)
    return None


def select(
    op: str, implementations: Mapping[str, Implementation], device: torch.device, *args: Any
) -> Callable[..., Any]:
    """Return the launcher that runs ``op`` for these arguments.

    Args:
        op: name for the log and the errors.
        implementations: backend name -> implementation; a backend may be missing.
        device: where the tensors are.
        *args: what the launcher will be called with, for ``supports``.

    Raises:
        BackendUnavailableError: the forced backend cannot run this call.
    """

    def objection(backend: str) -> str | None:
        if backend not in implementations:
            return f"{op} has no `{backend}` implementation"
        return backend_objection(backend, device) or implementations[backend].supports(*args)

    forced = forced_backend()
    if forced is not None:
        why_not = objection(forced)
        if why_not:
            raise BackendUnavailableError(
                f"{op}: backend `{forced}` was asked for but cannot run: {why_not}"
            )
        return implementations[forced].run

    objections: list[str] = []
    for backend in BACKENDS:
        why_not = objection(backend)
        if why_not is None:
            _log_once(op, device, backend, objections)
            return implementations[backend].run
        objections.append(f"{backend}: {why_not}")
    raise BackendUnavailableError(f"{op}: no backend can run: {'; '.join(objections)}")


def _log_once(op: str, device: torch.device, backend: str, objections: list[str]) -> None:
    key = (op, device.type, backend)
    if key in _logged:
        return
    _logged.add(key)
    # On a CPU `compile` is the fast path as long as Triton has no CPU target
    fastest = "compile" if device.type == "cpu" else "triton"
    if backend in (fastest, "triton"):
        logger.info("%s on %s runs on backend `%s`", op, device.type, backend)
    else:
        reasons = "; ".join(objections)
        logger.warning(
            "%s on %s runs on the slow backend `%s` (%s)", op, device.type, backend, reasons
        )
