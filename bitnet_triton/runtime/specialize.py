"""torch.compile without its recompile limit: one compiled function for every kind of arguments.

torch.compile keeps at most eight graphs of a function (``torch._dynamo.config.recompile_limit``)
and refuses the ninth, or falls back to eager mode. The layers of one model, in training and in
inference, with and without a bias, in two dtypes, need more than that.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compile_by_kind(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``function`` with dynamic sizes, once for each kind of its arguments.

    A kind is what dynamic shapes cannot cover: dtype, device, number of dimensions, which sizes
    are 0 or 1, contiguity, and the value of every argument that is no tensor. Within a kind,
    graphs differ only in which sizes are equal.

    Args:
        function: of tensors and hashable scalars, positional; without gradients.
    """
    compiled: dict[tuple, Callable[..., Any]] = {}

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        args = tuple([_plain(arg) for arg in args])
        kind = tuple([_kind(arg) for arg in args])
        run = compiled.get(kind)
        if run is None:
            copy = _copy(function, f"{function.__name__}_{len(compiled)}")
            run = compiled[kind] = torch.compile(copy, dynamic=True, fullgraph=True)
        return run(*args)

    return call


def _plain(arg: Any) -> Any:
    """Hide what graphs would be compiled anew for: parameters, and tensors that need gradients."""
    if isinstance(arg, Tensor) and (arg.requires_grad or type(arg) is not Tensor):
        return arg.detach()
    return arg


def _kind(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        sizes = tuple([size if size < 2 else 2 for size in arg.shape])
        return arg.dtype, arg.device, sizes, arg.is_contiguous()
    return arg


def _copy(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Copy ``function`` with its own code object, to which torch.compile ties its graphs."""
    assert isinstance(function, types.FunctionType)
    assert not function.__closure__
    return types.FunctionType(
        function.__code__.replace(co_name=name), function.__globals__, name, function.__defaults__
    )
