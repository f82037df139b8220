"""Reversible layers (arXiv:2001.04451, section 3): inputs are made again of outputs.

``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``; backwards ``x2 = y2 - g(y1)``, ``x1 = y1 - f(x2)``. A
stack keeps its last output alone, whatever its depth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from bitnet_triton.runtime.device import autocast_dtype


@dataclass(frozen=True)
class _State:
    """What a branch has found around itself: random numbers, and autocast."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    device_type: str
    autocast: torch.dtype | None

    @classmethod
    def now(cls, x: Tensor) -> _State:
        """Return what is there."""
        return cls(
            torch.get_rng_state(), *get_device_states(x), x.device.type,
            autocast_dtype(x.device.type),
        )  # fmt: skip

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Put it back inside of the block."""
        device_type = self.device_type if self.devices else "cuda"
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                torch.random.fork_rng(devices=self.devices, device_type=device_type)
            )
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=device_type)
            stack.enter_context(
                torch.autocast(
                    self.device_type, dtype=self.autocast, enabled=self.autocast is not None
                )
            )
            yield


class _Recomputed(torch.autograd.Function):
    """The stack on both streams; its parameters are inputs, so that their hooks see gradients."""

    @staticmethod
    def forward(
        ctx: Any, stack: ReversibleStack, x1: Tensor, x2: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        states = []
        for f, g in stack.pairs():
            states.append(_State.now(x1))
            x1 = x1 + f(x2)
            states.append(_State.now(x1))
            x2 = x2 + g(x1)
        ctx.stack, ctx.states, ctx.parameters = stack, states, parameters
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy1: Tensor, dy2: Tensor) -> tuple:
        y1, y2 = ctx.saved_tensors
        places = {id(p): i for i, p in enumerate(ctx.parameters)}
        grads: list[Tensor | None] = [None] * len(ctx.parameters)
        states = list(ctx.states)
        for f, g in reversed(list(ctx.stack.pairs())):
            out, dx = _differentiate(g, y1, dy2, states.pop(), places, grads)
            y2, dy1 = y2 - out, dy1 + dx
            out, dx = _differentiate(f, y2, dy1, states.pop(), places, grads)
            y1, dy2 = y1 - out, dy2 + dx
        return None, dy1, dy2, *grads


def _differentiate(
    branch: nn.Module, x: Tensor, dout: Tensor, state: _State, places: dict[int, int],
    grads: list[Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a branch again; return what it gives and dx, and add to the gradients of parameters."""
    wanted = [p for p in branch.parameters() if id(p) in places]
    with torch.enable_grad(), state.again():
        x = x.detach().requires_grad_()
        out = branch(x)
        found = torch.autograd.grad(out, [x, *wanted], dout.to(out.dtype), allow_unused=True)
    for parameter, grad in zip(wanted, found[1:]):
        at = places[id(parameter)]
        if grad is not None:
            there = grads[at]
            grads[at] = grad if there is None else there + grad
    dx = found[0]
    return out.detach(), torch.zeros_like(x) if dx is None else dx


class ReversibleStack(nn.Module):
    """Blocks of two branches on two streams, whose activations are made again in the backward.

    Both streams begin as ``x``, and the mean of both is the result. Branches bring their norms
    along; what else they read (masks, positions) has no gradient. A branch runs twice in training,
    with the same random numbers and under the same autocast: one that changes a buffer changes it
    twice. There is no room for a cache: what a branch remembered would be remembered twice.

    Args:
        blocks: pairs of f (attention) and g (feed-forward), each maps [..., D] to [..., D].
    """

    def __init__(self, blocks: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(pair) for pair in blocks)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield f and g of each block."""
        for block in self.blocks:
            f, g = cast("nn.ModuleList", block)
            yield f, g

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D].

        Raises:
            TypeError: ``x`` is neither float32 nor float64: a narrow subtraction does not undo a
                narrow addition. Branches may compute in any dtype.
        """
        if x.dtype not in (torch.float32, torch.float64):
            got = str(x.dtype).removeprefix("torch.")
            raise TypeError(f"`x`: expected dtype float32 or float64, got {got}")
        parameters = [p for p in self.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and (x.requires_grad or parameters):
            y1, y2 = _Recomputed.apply(self, x, x, *parameters)
        else:
            y1, y2 = self.plain(x, x)
        return (y1 + y2) / 2

    def plain(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Map both streams; under autograd this keeps every activation."""
        for f, g in self.pairs():
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return x1, x2

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Map what ``plain`` returns back to what it was given, without dropout."""
        for f, g in reversed(list(self.pairs())):
            y2 = y2 - g(y1)
            y1 = y1 - f(y2)
        return y1, y2
