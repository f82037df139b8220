"""Registered ops: straight to the launcher in eager mode, through the dispatcher when traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bitnet_triton.runtime import register_op
from bitnet_triton.runtime.device import autocast_dtype

seen = []


def _double(x: Tensor, times: int) -> Tensor:
    seen.append((torch.is_grad_enabled(), autocast_dtype("cpu")))
    return x * 2 * times


def _fake(x: Tensor, times: int) -> Tensor:
    return torch.empty_like(x)


double = register_op("test_double", _double, _fake)


@pytest.fixture(autouse=True)
def _forget():
    seen.clear()


def test_it_computes_and_is_registered():
    x = torch.randn(3)
    assert torch.equal(double(x, 2), x * 4)
    assert torch.equal(torch.ops.bitnet_triton.test_double(x, 2), x * 4)


def test_the_launcher_sees_neither_autograd_nor_autocast():
    x = torch.randn(3, requires_grad=True)
    for call in (double, torch.ops.bitnet_triton.test_double):
        with torch.autocast("cpu", torch.bfloat16):
            assert not double(x, 1).requires_grad
            call(x.detach(), 1)
    assert seen == [(False, None)] * 4


def test_a_function_that_calls_it_traces_without_a_break():
    x = torch.randn(3)
    compiled = torch.compile(lambda x: double(x + 1, 3) - 1, fullgraph=True)
    assert torch.equal(compiled(x), (x + 1) * 6 - 1)


def test_tracers_see_one_op_and_do_not_run_the_launcher():
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: double(x, 3), tracing_mode="fake")(torch.randn(3))
    assert any("test_double" in str(node.target) for node in graph.graph.nodes)
    assert seen == []


def test_a_dispatch_mode_sees_the_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            watched.append(func)
            return func(*args, **(kwargs or {}))

    watched, x = [], torch.randn(3)
    with Watch():
        y = double(x, 3)
    assert torch.equal(y, x * 6)
    assert watched[0] is torch.ops.bitnet_triton.test_double.default
    assert len(seen) == 1


def _add(x: Tensor, total: Tensor) -> Tensor:
    total += x
    return x * 2


add = register_op("test_add", _add, lambda x, total: x.new_empty(x.shape), mutates_args=("total",))


def test_a_change_is_made_once_however_the_op_is_called():
    x, totals = torch.randn(3), torch.zeros(3, 3)
    compiled = torch.compile(
        lambda x, total: add(x + 0, total), fullgraph=True, backend="aot_eager"
    )
    for call, total in zip((add, torch.ops.bitnet_triton.test_add, compiled), totals):
        assert torch.equal(call(x, total), x * 2)
    assert torch.equal(totals, x.expand(3, 3))


def test_autograd_is_told_of_a_change():
    for call in (add, torch.ops.bitnet_triton.test_add):
        total = torch.randn(3)
        product = (torch.ones(3, requires_grad=True) * total).sum()
        call(torch.randn(3), total)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_a_tensor_of_inference_mode_may_be_changed():
    with torch.inference_mode():
        total = torch.zeros(3)
        add(torch.ones(3), total)
    assert torch.equal(total, torch.ones(3))


@dataclass
class _Settings:
    """A bundle; the class counts how often one is taken apart and put together."""

    factor: float
    offset: Tensor | None = None
    flattened: ClassVar[int] = 0

    @classmethod
    def build(cls, factor: float, tensors: list[Tensor | None]) -> _Settings:
        return cls(factor, tensors[0])

    def flatten(self) -> tuple[float, list[Tensor | None]]:
        _Settings.flattened += 1
        return self.factor, [self.offset]


def _shifted(x: Tensor, settings: _Settings) -> Tensor:
    seen.append(settings)
    return x * settings.factor + (0 if settings.offset is None else settings.offset)


shifted = register_op(
    "test_shifted", _shifted, lambda x, settings: torch.empty_like(x), bundle=_Settings
)


def test_an_eager_call_hands_its_bundle_over_as_it_is(monkeypatch):
    monkeypatch.setattr(_Settings, "flattened", 0)
    x, settings = torch.randn(3), _Settings(2.0, torch.ones(3))
    assert torch.equal(shifted(x, settings), x * 2 + 1)
    assert seen == [settings]
    assert seen[0] is settings
    assert _Settings.flattened == 0


@pytest.mark.parametrize("offset", [None, torch.ones(3)], ids=["none", "tensor"])
def test_a_tracer_gets_the_parts_of_a_bundle(offset):
    x = torch.randn(3)
    op = torch.ops.bitnet_triton.test_shifted
    assert str(op.default._schema) == (
        "bitnet_triton::test_shifted(Tensor x, float factor, Tensor?[] tensors) -> Tensor"
    )
    compiled = torch.compile(
        lambda x: shifted(x + 1, _Settings(2.0, offset)) - 1, fullgraph=True, backend="aot_eager"
    )
    expected = (x + 1) * 2 + (0 if offset is None else 1) - 1
    assert torch.equal(compiled(x), expected)
    assert torch.equal(op(x + 1, 2.0, [offset]) - 1, expected)


def test_vmap_is_refused_by_name():
    """What it hands over has no memory, for which a kernel asks."""
    at = register_op("test_address", _address, _fake)
    with pytest.raises(ValueError, match=r"`test_address`: expected no torch\.vmap around it"):
        torch.vmap(lambda x: at(x, 1))(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="another error"):
        at(torch.randn(0), 1)


def _address(x: Tensor, times: int) -> Tensor:
    if not x.numel():
        raise RuntimeError("another error")
    return x * (x.data_ptr() > 0) * times
