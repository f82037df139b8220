"""torch.library registration without the dispatcher's cost in eager mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bitnet_triton.runtime.device import autocast_dtype

NAMESPACE = "bitnet_triton"

# Others (fake and functional tensors of tracers, for instance) mean something to the dispatcher
_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def register_op(
    name: str,
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    function: type[torch.autograd.Function] | None = None,
) -> Callable[..., Any]:
    """Register ``launcher`` as ``torch.ops.bitnet_triton.<name>`` and return what ops call.

    The returned callable goes straight to the launcher in eager mode (a custom op costs some
    7 microseconds a call on a CPU) and to the registered op while something traces or watches: a
    FLOP counter, selective checkpointing. Either way the launcher runs without autograd and without
    autocast: it is mathematics on tensors in the dtypes that it was given.

    Args:
        name: name of the op inside the namespace.
        launcher: typed function of tensors (the first argument is one) and scalars that returns
            new tensors.
        fake: same signature, returns empty tensors of the right shapes.
        function: its ``setup_context`` and ``backward`` become the autograd rule of the op.
    """

    @functools.wraps(launcher)
    def plain(*args: Any) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return plain(*args)
        device_type = args[0].device.type
        if autocast_dtype(device_type) is not None:
            with torch.autocast(device_type, enabled=False):
                return launcher(*args)
        return launcher(*args)

    schema = torch.library.infer_schema(launcher, mutates_args=())
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", plain, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if function is not None:
        op.register_autograd(function.backward, setup_context=function.setup_context)

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN_TENSORS or _is_watched():
            return op(*args)
        return plain(*args)

    return call


def _is_watched() -> bool:
    """Tell whether a dispatch mode wants to see every op."""
    return torch._C._len_torch_dispatch_stack() > 0
