"""torch.library registration without the dispatcher's cost in eager mode."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

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
    mutates_args: Sequence[str] = (),
) -> Callable[..., Any]:
    """Register ``launcher`` as ``torch.ops.bitnet_triton.<name>`` and return what ops call.

    The returned callable goes straight to the launcher in eager mode (a custom op costs some
    7 microseconds a call on a CPU) and to the registered op while something traces or watches: a
    FLOP counter, selective checkpointing. Either way the launcher runs without autograd and without
    autocast: it is mathematics on tensors in the dtypes that it was given.

    Args:
        name: name of the op inside the namespace.
        launcher: typed function of tensors (the first argument is one) and scalars that returns
            new tensors, and writes to none but those of ``mutates_args``.
        fake: same signature, returns empty tensors of the right shapes.
        function: its ``setup_context`` and ``backward`` become the autograd rule of the op.
        mutates_args: names of the tensors that the launcher writes to. Autograd and tracers are
            told of it; such an op has no autograd rule.
    """
    assert function is None or not mutates_args
    names = list(inspect.signature(launcher).parameters)
    mutated = [names.index(name) for name in mutates_args]

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

    schema = torch.library.infer_schema(launcher, mutates_args=mutates_args)
    op = torch.library.custom_op(
        f"{NAMESPACE}::{name}", plain, mutates_args=mutates_args, schema=schema
    )
    op.register_fake(fake)
    if function is not None:
        # torch reads it in every call, and would make it anew each time: some 20 microseconds
        cast("Any", function.forward).__signature__ = inspect.signature(function.forward)
        op.register_autograd(function.backward, setup_context=function.setup_context)

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN_TENSORS or _is_watched():
            return op(*args)
        # as the dispatcher does: a backward that saved the tensor then notices the change
        for place in mutated:
            torch.autograd.graph.increment_version(args[place])
        return plain(*args)

    return call


def _is_watched() -> bool:
    """Tell whether a dispatch mode wants to see every op."""
    return torch._C._len_torch_dispatch_stack() > 0
