"""Reversible layers: gradients of the same function, memory that no depth adds to, and dropout."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bitnet_triton.kernels import lsh_attention
from bitnet_triton.nn import ReversibleStack


class Buckets(nn.Module):
    """Attention inside of buckets, with a norm of its own."""

    def __init__(self, D):
        super().__init__()
        self.norm, self.qk, self.v = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        x = self.norm(x)
        qk, v = (t.unflatten(-1, (2, -1)) for t in (self.qk(x), self.v(x)))
        return lsh_attention(qk, v, rounds=2, buckets=4, window=8).flatten(2)


def feed_forward(D, dropout=0.0):
    return nn.Sequential(
        nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * D, D)
    )


def mixers(D, depth, dropout=0.0):
    return ReversibleStack(
        (feed_forward(D, dropout), feed_forward(D, dropout)) for _ in range(depth)
    )


def gradients(stack, x, dout, is_plain):
    x = x.detach().clone().requires_grad_()
    y = sum(stack.plain(x, x)) / 2 if is_plain else stack(x)
    found = torch.autograd.grad(y, [x, *stack.parameters()], dout)
    return {"y": y.detach()} | {str(i): g for i, g in enumerate(found)}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_plain_function(dropout):
    stack = mixers(16, 5, dropout).double()
    x, dout = torch.randn(2, 3, 9, 16, dtype=torch.float64)
    results = []
    for is_plain in (True, False):
        torch.manual_seed(5)
        results.append(gradients(stack, x, dout, is_plain))
        after = torch.rand(1)
    for name, t in results[0].items():
        torch.testing.assert_close(results[1][name], t, rtol=1e-9, atol=1e-11)
    torch.manual_seed(5)
    stack.plain(x, x)
    assert torch.equal(after, torch.rand(1)), "the backward has moved the random numbers"


def test_attention_inside_of_buckets_is_a_branch():
    stack = ReversibleStack((Buckets(32), feed_forward(32)) for _ in range(3))
    x, dout = torch.randn(2, 2, 40, 32)
    plain, ours = (gradients(stack, x, dout, is_plain) for is_plain in (True, False))
    for name, t in plain.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-3, atol=1e-5)


def test_hooks_and_frozen_parameters_are_as_ever():
    stack, seen = mixers(8, 2), []
    first, *_, last = stack.parameters()
    first.requires_grad_(False)
    last.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    stack(torch.randn(3, 8)).sum().backward()
    assert first.grad is None
    assert len(seen) == 1
    assert torch.equal(seen[0], last.grad)


def test_one_module_in_two_blocks_has_the_sum_of_both():
    shared = feed_forward(8)
    stack = ReversibleStack([(shared, feed_forward(8)), (shared, shared)]).double()
    x, dout = torch.randn(2, 5, 8, dtype=torch.float64)
    plain, ours = (gradients(stack, x, dout, is_plain) for is_plain in (True, False))
    for name, t in plain.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-9, atol=1e-11)


def test_inputs_come_back():
    stack, x = mixers(16, 8), torch.randn(2, 9, 16)
    with torch.no_grad():
        for t in stack.inverse(*stack.plain(x, x)):
            assert (t - x).abs().max() < 1e-5


def test_without_gradients_nothing_is_kept():
    stack, x = mixers(16, 2), torch.randn(2, 16)
    with torch.no_grad():
        assert stack(x).grad_fn is None
    assert stack(x).grad_fn is not None


def test_autocast_is_that_of_the_forward():
    stack, x = mixers(16, 2), torch.randn(9, 16)
    results = []
    for is_plain in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = sum(stack.plain(x, x)) / 2 if is_plain else stack(x)
        results.append(torch.autograd.grad(y.sum(), list(stack.parameters())))
    for plain, ours in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


class Peak(TorchDispatchMode):
    """The most bytes of tensors that lived at a time since the mode was entered."""

    def __init__(self):
        super().__init__()
        self.known, self.held, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_iter(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.held += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.held)
        return result

    def forget(self, key, size):
        self.known.discard(key)
        self.held -= size


def peak(depth, is_plain):
    stack, x = mixers(16, depth), torch.randn(4000, 16)
    with Peak() as mode:
        y = sum(stack.plain(x, x)) / 2 if is_plain else stack(x)
        y.sum().backward()
    return mode.most


def test_memory_does_not_grow_with_depth():
    four, eight, sixteen = (peak(depth, False) for depth in (4, 8, 16))
    assert max(four, eight, sixteen) < 1.1 * min(four, eight, sixteen)
    assert peak(16, True) > 3 * peak(4, True) > 2 * four  # what is counted does grow


def test_narrow_streams_are_refused():
    with pytest.raises(TypeError, match="float32 or float64, got bfloat16"):
        mixers(8, 1)(torch.randn(3, 8).bfloat16())
