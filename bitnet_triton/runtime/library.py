"""torch.library registration without the dispatcher's cost in eager mode."""

from __future__ import annotations

import functools
import inspect
import typing
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
    bundle: type[Any] | None = None,
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
        bundle: class of the last argument of ``launcher`` and ``fake``. Its method ``flatten``
            returns tensors and plain numbers, of which its class method ``build``, whose parameters
            have types, makes it again. The registered op, and so its autograd rule, has these parts
            in its place; an eager call hands it over as it is.
    """
    assert function is None or not mutates_args
    names = list(inspect.signature(launcher).parameters)
    bundled = len(names) - 1
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

    typed, run_fake = launcher, fake
    run_op: Callable[..., Any] = plain
    if bundle is not None:
        typed = _typed_in_parts(launcher, bundle)
        run_op, run_fake = (_taking_parts(f, bundled, bundle) for f in (plain, fake))
    schema = torch.library.infer_schema(typed, mutates_args=mutates_args)
    op = torch.library.custom_op(
        f"{NAMESPACE}::{name}", run_op, mutates_args=mutates_args, schema=schema
    )
    op.register_fake(run_fake)
    if function is not None:
        # torch reads it in every call, and would make it anew each time: some 20 microseconds
        cast("Any", function.forward).__signature__ = inspect.signature(function.forward)
        op.register_autograd(function.backward, setup_context=function.setup_context)

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN_TENSORS or _is_watched():
            return op(*args) if bundle is None else op(*args[:bundled], *args[bundled].flatten())
        # as the dispatcher does: a backward that saved the tensor then notices the change
        for place in mutated:
            torch.autograd.graph.increment_version(args[place])
        try:
            return plain(*args)
        except RuntimeError as error:  # of a batch of vmap: a kernel asks for memory, it has none
            if not any(map(_is_mapped, args)):
                raise
            raise ValueError(
                f"`{name}`: expected no torch.vmap around it, put the batch into the first "
                "dimension of its tensors"
            ) from error

    return call


def _taking_parts(
    function: Callable[..., Any], bundled: int, bundle: type[Any]
) -> Callable[..., Any]:
    """Return ``function`` with the parts of its last argument, number ``bundled``, in its place."""

    def run(*args: Any) -> Any:
        return function(*args[:bundled], bundle.build(*args[bundled:]))

    return run


def _typed_in_parts(launcher: Callable[..., Any], bundle: type[Any]) -> Callable[..., Any]:
    """Return a function that only says what the registered op takes and returns."""

    def typed(*args: Any) -> Any:
        raise AssertionError

    own, parts = (
        _resolved(inspect.signature(f), typing.get_type_hints(f)) for f in (launcher, bundle.build)
    )
    parameters = [*list(own.parameters.values())[:-1], *parts.parameters.values()]
    cast("Any", typed).__signature__ = own.replace(parameters=parameters)
    return typed


def _resolved(signature: inspect.Signature, hints: dict[str, Any]) -> inspect.Signature:
    """Return a signature with types in place of their names."""
    parameters = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]
    return inspect.Signature(parameters, return_annotation=hints.get("return"))


def _is_mapped(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_batchedtensor(value)


def _is_watched() -> bool:
    """Tell whether a dispatch mode wants to see every op."""
    return torch._C._len_torch_dispatch_stack() > 0
