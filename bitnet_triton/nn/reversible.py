"""Reversible layers (arXiv:2001.04451, section 3): inputs are made again of outputs.

``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``; backwards ``x2 = y2 - g(y1)``, ``x1 = y1 - f(x2)``. A
stack keeps its last output alone, whatever its depth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from bitnet_triton.runtime import remember_backend, remembered_backend
from bitnet_triton.runtime.device import autocast_dtype


class Branch(Protocol):
    """What a block adds to one of its streams: a module, or anything else that is called so."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Map [..., D] to [..., D]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what it learns."""


Pairs = Sequence[tuple[Branch, Branch]]


@dataclass(frozen=True)
class _State:
    """What a branch has found around itself: random numbers, and autocast."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]
    device_type: str
    autocast: torch.dtype | None

    @classmethod
    def now(cls, x: Tensor, last: _State | None) -> _State:
        """Return what is there; what no branch has drawn from is shared with ``last``."""
        cpu = torch.get_rng_state()
        if last is not None and torch.equal(cpu, last.cpu):
            cpu = last.cpu
        return cls(cpu, *get_device_states(x), x.device.type, autocast_dtype(x.device.type))

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


class _Tape:
    """Blocks, and while the backward goes through them, the outputs of the next one."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self.outputs: tuple[Tensor, Tensor] | None = None
        self._state: _State | None = None

    def state(self, x: Tensor) -> _State:
        """Return what the next branch finds around itself."""
        self._state = _State.now(x, self._state)
        return self._state

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the outputs, and let them go."""
        outputs, self.outputs = self.outputs, None
        assert outputs is not None
        return outputs


class _Block(torch.autograd.Function):
    """One block on both streams; the last one keeps its outputs, the others keep nothing.

    Parameters are inputs, so that their hooks see gradients, and see them block by block.
    """

    @staticmethod
    def forward(
        ctx: Any, tape: _Tape, index: int, x1: Tensor, x2: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        f, g = tape.pairs[index]
        of_f = tape.state(x1)
        x1 = x1 + f(x2)
        of_g = tape.state(x1)
        x2 = x2 + g(x1)
        ctx.tape, ctx.index, ctx.states, ctx.parameters = tape, index, (of_f, of_g), parameters
        if index == len(tape.pairs) - 1:
            ctx.save_for_backward(x1, x2)
        remember_backend(ctx)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy1: Tensor, dy2: Tensor) -> tuple:
        tape, (of_f, of_g) = ctx.tape, ctx.states
        y1, y2 = ctx.saved_tensors or tape.take()
        places = {id(p): i for i, p in enumerate(ctx.parameters)}
        grads: list[Tensor | None] = [None] * len(ctx.parameters)
        f, g = tape.pairs[ctx.index]
        with remembered_backend(ctx):
            out, dx = _differentiate(g, y1, dy2, of_g, places, grads)
            y2, dy1 = y2 - out, dy1 + dx
            out, dx = _differentiate(f, y2, dy1, of_f, places, grads)
            y1, dy2 = y1 - out, dy2 + dx
        if ctx.index:
            tape.outputs = y1, y2
        return None, None, dy1, dy2, *grads


def _differentiate(
    branch: Branch, x: Tensor, dout: Tensor, state: _State, places: dict[int, int],
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


@torch.compiler.disable(
    reason="reversible layers run again in the backward, which no graph of torch.compile holds"
)
def _run_recomputed(pairs: Pairs, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    tape = _Tape(pairs)
    for index, pair in enumerate(pairs):
        every = dict.fromkeys(p for branch in pair for p in branch.parameters())
        parameters = [p for p in every if p.requires_grad]
        x1, x2 = cast("tuple[Tensor, Tensor]", _Block.apply(tape, index, x1, x2, *parameters))
    return x1, x2


def run_reversible(pairs: Pairs, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Run blocks on two streams; their activations are made again in the backward.

    What a branch reads beside its stream (masks, positions) has no gradient. Under torch.compile
    this part of training is left out of the graph; without gradients all of it is in.

    Args:
        pairs: f and g of each block.
        x1: [..., D], float32 or float64.
        x2: likewise.

    Returns:
        Both streams behind the last block.

    Raises:
        TypeError: a stream is neither float32 nor float64: a narrow subtraction does not undo a
            narrow addition. Branches may compute in any dtype.
    """
    for x in (x1, x2):
        if x.dtype not in (torch.float32, torch.float64):
            got = str(x.dtype).removeprefix("torch.")
            raise TypeError(f"`x`: expected dtype float32 or float64, got {got}")
    run = _run_recomputed if torch.is_grad_enabled() else _run_plain
    return run(pairs, x1, x2)


def _run_plain(pairs: Pairs, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    for f, g in pairs:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    return x1, x2


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
            TypeError: ``x`` is neither float32 nor float64.
        """
        y1, y2 = run_reversible(list(self.pairs()), x, x)
        return (y1 + y2) / 2

    def plain(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Map both streams; under autograd this keeps every activation."""
        return _run_plain(list(self.pairs()), x1, x2)

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Map what ``plain`` returns back to what it was given, without dropout."""
        for f, g in reversed(list(self.pairs())):
            y2 = y2 - g(y1)
            y1 = y1 - f(y2)
        return y1, y2
