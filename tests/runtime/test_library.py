"""Registered ops: straight to the launcher in eager mode, through the dispatcher when traced."""

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
