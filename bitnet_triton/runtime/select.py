"""Choose a backend: forced, else the first that can run. The only place that decides.

An op brings a table of implementations; ``select`` returns the one that runs. Each op logs its
choice once for every device: at INFO when it is the preferred backend, at WARNING with the
objections when it is not. Where several ops share the first objection, the first of them warns.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from bitnet_triton.errors import BackendUnavailableError
from bitnet_triton.runtime.device import (
    compile_objection,
    real_triton_cpu_objection,
    triton_objection,
)

logger = logging.getLogger("bitnet_triton")

BACKENDS = ("triton", "compile", "reference")
# Only on demand: the same kernels, through the separate project triton-cpu where it is installed
TRITON_CPU = "triton-cpu"
ENVIRONMENT_VARIABLE = "BITNET_TRITON_BACKEND"

_forced: ContextVar[str | None] = ContextVar("bitnet_triton_backend", default=None)
_logged: set[tuple[str, str, str]] = set()
# Why the preferred backend does not run on a device: a warning once, not once an op
_told: set[tuple[str, str]] = set()


def _no_objection(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        run: the launcher.
        supports: takes what the op hands to ``select`` as ``*args``, returns an objection or None.
    """

    run: Callable[..., Any]
    supports: Callable[..., str | None] = _no_objection


def _checked(backend: str, source: str) -> str:
    names = (*BACKENDS, TRITON_CPU)
    if backend not in names:
        raise ValueError(f"{source}: expected one of {', '.join(names)}, got {backend!r}")
    return backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force ``backend`` inside a ``with`` block, in this thread or task.

    The backward of an op takes the backend that was forced in its forward, wherever it runs.
    Code under torch.compile looks when it runs, not when it is traced.

    Args:
        backend: "triton", "compile" or "reference", or "triton-cpu" for the Triton kernels
            through the separate project of that name. The environment variable
            ``BITNET_TRITON_BACKEND`` does the same for a whole process; the block wins over it.

    Raises:
        ValueError: ``backend`` is none of these.
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


def remember_backend(ctx: Any) -> None:
    """Note the forced backend in ``setup_context`` of an autograd function.

    On a GPU the backward runs in a thread of autograd, which does not see the ``with`` block.
    """
    ctx.backend = None if torch.compiler.is_compiling() else forced_backend()


def remembered_backend(ctx: Any) -> contextlib.AbstractContextManager[None]:
    """Return the block in which ``backward`` calls its ops."""
    return contextlib.nullcontext() if ctx.backend is None else use_backend(ctx.backend)


def backend_objection(backend: str, device: torch.device) -> str | None:
    """Say why ``backend`` cannot run on ``device`` at all; None when it can."""
    return _device_objection(backend, device.type)


@functools.cache
def _device_objection(backend: str, device_type: str) -> str | None:
    if backend == "triton":
        return triton_objection(torch.device(device_type))
    if backend == TRITON_CPU:
        return real_triton_cpu_objection(torch.device(device_type))
    if backend == "compile":
        return compile_objection(torch.device(device_type))
    return None


def explain(
    op: str, implementations: Mapping[str, Implementation], device: torch.device
) -> list[tuple[str, str | None]]:
    """Return the backends that ``select`` would try on ``device``, each with its objection.

    What an implementation thinks of particular shapes and dtypes is left out.
    """
    forced = forced_backend()
    return [
        (backend, _objection(op, implementations, backend, device.type))
        for backend in (BACKENDS if forced is None else (forced,))
    ]


def _table_name(backend: str) -> str:
    """Return the name under which ops list the launchers of ``backend``."""
    return "triton" if backend == TRITON_CPU else backend


def _objection(
    op: str, implementations: Mapping[str, Implementation], backend: str, device_type: str
) -> str | None:
    if _table_name(backend) not in implementations:
        return f"{op} has no `{backend}` implementation"
    return _device_objection(backend, device_type)


def select(
    op: str, implementations: Mapping[str, Implementation], device: torch.device, *args: Any
) -> Callable[..., Any]:
    """Return the launcher that runs ``op`` for these arguments.

    Args:
        op: name for the log and the errors.
        implementations: backend name -> implementation; a backend may be missing.
        device: where the tensors are.
        *args: what ``supports`` of the implementations looks at.

    Raises:
        BackendUnavailableError: the forced backend cannot run this call.
    """
    forced = forced_backend()
    objections: list[tuple[str, str]] = []
    for backend in BACKENDS if forced is None else (forced,):
        objection = _objection(op, implementations, backend, device.type)
        if objection is None:
            objection = implementations[_table_name(backend)].supports(*args)
        if objection is None:
            if forced is None and (op, device.type, backend) not in _logged:
                _log_choice(op, device.type, backend, objections)
            return implementations[_table_name(backend)].run
        objections.append((backend, objection))
    if forced is not None:
        raise BackendUnavailableError(
            f"{op}: backend `{forced}` was asked for but cannot run: {objections[0][1]}"
        )
    raise BackendUnavailableError(f"{op}: no backend can run: {_joined(objections)}")


def _joined(objections: list[tuple[str, str]]) -> str:
    return "; ".join(f"{backend}: {objection}" for backend, objection in objections)


def _log_choice(op: str, device_type: str, backend: str, objections: list[tuple[str, str]]) -> None:
    _logged.add((op, device_type, backend))
    # On a CPU `compile` is fast as well; `reference` is not
    fast = ("triton", "compile") if device_type == "cpu" else ("triton",)
    if backend in fast:
        logger.info("%s on %s runs on backend `%s`", op, device_type, backend)
        return
    reason = (device_type, objections[0][1])
    level = logging.INFO if reason in _told else logging.WARNING
    _told.add(reason)
    logger.log(
        level,
        "%s on %s runs on the slow backend `%s` (%s); `bitnet-triton doctor` tells of all ops",
        op, device_type, backend, _joined(objections),
    )  # fmt: skip


def forget_logged_choices() -> None:
    """Log the next choice of every op again, as in a fresh process."""
    _logged.clear()
    _told.clear()
