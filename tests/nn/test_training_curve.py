"""Two hundred steps of a small transformer: kernels and reference formula draw the same loss curve.

Both start from the same weights and see the same text, the source of a module of Python. Rounding
flips codes that lie beside a threshold, so that two right implementations part in time as two
seeds do: step by step they are compared at the start, and as curves over three seeds afterwards.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitnet_triton.kernels import bit_linear
from bitnet_triton.kernels.bit_linear.reference import bit_linear_reference

SEEDS, STEPS, WINDOW = (0, 1, 2), 200, 20
WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 64, 8


class Linear(nn.Linear):
    def __init__(self, K, N, op):
        super().__init__(K, N, bias=False)
        self.op = op

    def forward(self, x):
        y = self.op(x.flatten(0, -2), self.weight)
        return y.view(*x.shape[:-1], -1)


class Block(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = Linear(WIDTH, 3 * WIDTH, op), Linear(WIDTH, WIDTH, op)
        self.up, self.down = Linear(WIDTH, 3 * WIDTH, op), Linear(3 * WIDTH, WIDTH, op)

    def forward(self, x):
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        )
        return x + self.down(self.up(self.norms[1](x)).relu().square())


class Model(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(op) for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places.weight)))


def text():
    return torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)


def curve(op, seed, *, autocast=False, steps=STEPS):
    """Train from ``seed`` on and return the loss of every step [steps]."""
    torch.manual_seed(seed)
    model, data = Model(op), text().long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH,)).tolist()
        batch = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def smooth(curves):
    return curves.unfold(-1, WINDOW, WINDOW).mean(-1)


@pytest.fixture(scope="module")
def reference():
    return torch.stack([curve(bit_linear_reference, seed) for seed in SEEDS])


@pytest.mark.slow
def test_float32_steps_are_those_of_the_reference_until_rounding_flips_a_code(reference):
    for seed, expected in zip(SEEDS, reference):
        ours = curve(bit_linear, seed, steps=10)
        torch.testing.assert_close(ours, expected[:10], rtol=2e-4, atol=0)
        torch.testing.assert_close(ours[:3], expected[:3], rtol=3e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_the_loss_curve_lies_on_that_of_the_reference(autocast, reference, record_property):
    ours = torch.stack([curve(bit_linear, seed, autocast=autocast) for seed in SEEDS])
    difference = smooth(ours) - smooth(reference)  # [seeds, windows]
    noise = smooth(reference).std(0)  # between seeds
    record_property("final losses", smooth(ours)[:, -1].tolist())
    record_property("final losses of the reference", smooth(reference)[:, -1].tolist())
    record_property("largest mean difference", difference.mean(0).abs().max().item())
    assert smooth(reference)[:, -1].max() < 0.6 * reference[:, 0].min()  # it learns
    # far inside the noise between seeds, in every window and without a lean over all of them
    assert (difference.mean(0).abs() <= noise.clamp_max(0.01)).all(), (difference, noise)
    assert difference.mean().abs() <= 0.003, difference
