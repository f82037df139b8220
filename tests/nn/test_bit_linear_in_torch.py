"""BitLinear under what people do to a layer: compile, checkpoint, accumulate, scale, wrap."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from bitnet_triton.kernels.bit_linear import launchers
from bitnet_triton.nn import BitLinear
from bitnet_triton.runtime import Implementation
from bitnet_triton.testing import assert_close, randn

N, K = 24, 40


@pytest.fixture
def calls(monkeypatch):
    """Names of the tables whose launcher ran, in order."""
    ran = []
    for name in ("BIT_FWD", "BIT_BWD_DX", "BIT_BWD_DWEIGHT"):
        table = getattr(launchers, name)
        for backend, implementation in list(table.items()):

            def run(*args, _run=implementation.run, _name=name):
                ran.append(_name)
                return _run(*args)

            monkeypatch.setitem(table, backend, Implementation(run, implementation.supports))
    return ran


def layer(*, frozen=False):
    return BitLinear(K, N).requires_grad_(not frozen)


def gradients(module, loss):
    return torch.autograd.grad(loss, list(module.parameters()))


def test_a_layer_compiles_whole_and_trains_as_in_eager_mode(device):
    block = nn.Sequential(layer(), nn.ReLU(), BitLinear(N, K, levels="binary")).to(device)
    x = randn(7, K, device=device)
    compiled = torch.compile(block, fullgraph=True)
    for call in (block, compiled):
        with torch.autocast(device, torch.bfloat16):
            y = call(x)
        y.float().square().sum().backward()
        if call is block:
            expected, grads = y, [p.grad for p in block.parameters()]
            block.zero_grad(set_to_none=True)
    assert torch.equal(y, expected)
    for parameter, grad in zip(block.parameters(), grads):
        torch.testing.assert_close(parameter.grad, grad, rtol=2e-2, atol=1e-3)


def test_a_layer_that_is_used_twice_in_a_step_adds_its_gradients(device):
    square = BitLinear(K, K, bias=False).to(device)
    x = randn(6, K, device=device)
    (twice,) = gradients(square, square(square(x).tanh()).square().sum())
    copies = [BitLinear(K, K, bias=False).to(device) for _ in range(2)]
    for copy in copies:
        copy.load_state_dict(square.state_dict())
    loss = copies[1](copies[0](x).tanh()).square().sum()
    parts = torch.autograd.grad(loss, [copy.weight for copy in copies])
    assert torch.equal(twice, parts[0] + parts[1])


def test_accumulated_gradients_are_those_of_the_whole_batch(device):
    module, x = layer().to(device), randn(12, K, device=device)
    whole = gradients(module, module(x).square().sum())
    for part in x.split(5):
        module(part).square().sum().backward()
    for parameter, exact in zip(module.parameters(), whole):
        assert_close("gradient", parameter.grad, exact.double(), worst=1e-4 * exact.abs().max())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_forward_again_and_gives_the_same(reentrant, calls, device):
    module, x = layer().to(device), randn(5, K, device=device).requires_grad_()
    plain = gradients(module, module(x).square().sum())
    calls.clear()
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert calls == ["BIT_FWD", "BIT_FWD", "BIT_BWD_DX", "BIT_BWD_DWEIGHT"]
    for parameter, grad in zip(module.parameters(), plain):
        assert torch.equal(parameter.grad, grad)


def test_selective_checkpointing_can_keep_what_the_layer_made(calls, device):
    module, x = layer().to(device), randn(5, K, device=device).requires_grad_()
    plain = gradients(module, module(x).square().sum())
    calls.clear()

    def keep(context, op, *args, **kwargs):
        ours = op is torch.ops.bitnet_triton.bit_linear_fwd.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, keep)
    checkpoint(module, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    assert calls == ["BIT_FWD", "BIT_BWD_DX", "BIT_BWD_DWEIGHT"]
    for parameter, grad in zip(module.parameters(), plain):
        assert torch.equal(parameter.grad, grad)


def test_a_gradient_scaler_undoes_its_scale_and_skips_an_overflow():
    module, x = layer(), randn(6, K)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module.weight.detach().clone()
    for scale, skipped in ((2.0**10, False), (2.0**30, True)):
        with torch.no_grad():
            module.weight.copy_(before)
        optimizer.zero_grad(set_to_none=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            loss = module(x).float().square().mean()
        (plain,) = torch.autograd.grad(loss, module.weight, retain_graph=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(module.weight, before) == skipped
        assert (scaler.get_scale() < scale) == skipped
        if not skipped:
            torch.testing.assert_close(module.weight, before - 0.1 * plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_counted_forward_and_backward(frozen, device):
    module, x = layer(frozen=frozen).to(device), randn(2, 3, K, device=device).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    dense = nn.Linear(K, N).to(device).requires_grad_(not frozen)
    with FlopCounterMode(display=False) as expected:
        dense(x).sum().backward()
    assert counter.get_total_flops() == expected.get_total_flops() > 0


def test_a_frozen_layer_computes_the_input_gradient_only(calls, device):
    module, x = layer(frozen=True).to(device), randn(5, K, device=device).requires_grad_()
    module(x).sum().backward()
    assert calls == ["BIT_FWD", "BIT_BWD_DX"]
    assert module.weight.grad is None
    assert x.grad.ne(0).any()


@pytest.mark.peer
def test_lora_around_a_frozen_layer_trains_its_own_matrices_only(calls, device):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(layer()).to(device)
    base = model[0]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    )
    x = randn(6, K, device=device)
    y = wrapped(x)
    y.square().sum().backward()
    assert "BIT_BWD_DWEIGHT" not in calls
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    assert {n.split(".")[-3] for n in trained} == {"lora_A", "lora_B"}
    adapter = model[0]
    low_rank = x @ adapter.lora_A["default"].weight.t() @ adapter.lora_B["default"].weight.t()
    torch.testing.assert_close(y, base(x) + 2 * low_rank)
