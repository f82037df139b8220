"""Heads that look back a few tokens hand their weights on to the convolution of a linear layer.

Softmax attention finds the token before by an angle; the gated delta rule has no angles, and a
short convolution for it. Few tokens of training do not lead from one to the other, and what is
built on that layer is lost with it. So its convolution starts with what the heads do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_triton.attention.linear_parts import GatedParts

_EXPLAINED = 0.5  # of the spread of a head's outputs, by sums of its latest values
_ENTERS = 0.1  # root mean square of what enters SiLU, which is linear there
_POSITIVE = 8.0  # root mean square behind which SiLU leaves next to nothing below 0
_FORGETS = 6.0  # bias of a decay by which nothing is left one token later
_BISECTIONS = 50


@torch.no_grad()
def begin_as(student: nn.Module, teacher: nn.Module, batch: dict[str, Any]) -> list[list[float]]:
    """Start the gated delta rule with what can be read off the attention that it replaces.

    The gate of each head opens as far as the head's outputs are large. Where sums of the latest
    values of a key head, weighted alike for all tokens, say more than half of what its query heads
    give, the convolution of these values takes the weights, the state forgets at once, and queries
    and keys are made positive: what is left is the sign of their product.

    Args:
        student: ``BitNetForCausalLM``, changed in place.
        teacher: ``BitNetForCausalLM`` of as many layers, which has been trained.
        batch: one row of packed documents, arguments of the teacher, with ``position_ids``.

    Returns:
        For each layer of ``student`` with the gated delta rule and each of its key heads, the
        share of the spread of outputs over tokens that such sums explain; 0: it has none.
    """
    found = []
    with ExitStack() as stack:
        pairs = [
            (parts, stack.enter_context(_watched(other.self_attn)))
            for own, other in zip(_layers(student), _layers(teacher))
            if not any(_gated(other.self_attn))  # converted before, and trained since
            for parts in _gated(own.self_attn)
        ]
        if pairs:
            teacher.model(**batch, use_cache=False)  # type: ignore[operator]
    positions = batch["position_ids"].flatten()
    for parts, seen in pairs:
        _, H, Hk, D = parts.gates.sizes
        v = seen["v"].reshape(-1, Hk, D).double()
        out = seen["out"].reshape(-1, Hk, H // Hk, D).double()
        size = out.square().mean(dim=(0, 3)).sqrt().flatten()
        parts.gates.gate_bias.copy_(_inverse_silu(size).repeat_interleave(D))
        heads = range(Hk if parts.convolution is not None else 0)
        shares = [_hand_on(parts, head, v[:, head], out[:, head], positions) for head in heads]
        for head, share in enumerate(shares):
            if share > _EXPLAINED:
                _forget_at_once(parts, head, seen["q"], seen["k"])
        found.append(shares)
    return found


def _hand_on(parts: GatedParts, head: int, v: Tensor, out: Tensor, positions: Tensor) -> float:
    """Set the convolution of a key head's values, if that explains its outputs; return how far.

    Args:
        parts: of the layer.
        head: of the keys.
        v: [T D], its values.
        out: [T G D], of the query heads that read it.
        positions: int64 [T], of each token in its document.
    """
    assert parts.convolution is not None
    _, H, Hk, D = parts.gates.sizes
    weight = parts.convolution.weight
    taps = weight.shape[1]
    latest = [
        F.pad(v, (0, 0, back, 0))[: len(v)] * (positions >= back)[:, None]
        for back in range(taps - 1, -1, -1)
    ]
    x, spread = torch.stack([t - t.mean(0) for t in latest], dim=-1), out - out.mean(0)
    among = spread.square().sum()
    if not among > 0:
        return 0.0
    best = torch.linalg.lstsq(x.flatten(0, 1), spread.mean(1).reshape(-1, 1)).solution[:, 0]
    explained = (1 - ((x @ best)[:, None] - spread).square().sum() / among).item()
    if explained > _EXPLAINED:
        enters = torch.stack(latest, dim=-1) @ best
        first = (H + Hk + head) * D
        weight[first : first + D] = (best * _ENTERS / enters.square().mean().sqrt()).to(weight)
    return explained


def _forget_at_once(parts: GatedParts, head: int, q: Tensor, k: Tensor) -> None:
    """Let a key head's state be its latest value times a positive number.

    Args:
        parts: of the layer.
        head: of the keys.
        q: [1 T H*D], what enters the convolution.
        k: [1 T Hk*D], the same.
    """
    assert parts.convolution is not None
    _, H, Hk, D = parts.gates.sizes
    parts.gates.decay_bias.view(Hk, -1)[head] = _FORGETS
    for x, first, heads in ((q, 0, H // Hk), (k, H * D, 1)):
        channels = slice(head * heads * D, (head + 1) * heads * D)
        size = x[..., channels].float().square().mean().sqrt()
        weight = parts.convolution.weight[first:][channels]
        weight[:, :-1] = 0.0
        if size > 0:  # of zeros every weight makes zeros
            weight[:, -1] = _POSITIVE / size


def _inverse_silu(y: Tensor) -> Tensor:
    """Return x, at least 0, of which SiLU is y."""
    low, high = torch.zeros_like(y), y + 1
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = F.silu(middle) > y
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low


@contextmanager
def _watched(layer: Any) -> Iterator[dict[str, Tensor]]:
    """Give a dict that holds q, k, v and ``out`` of an attention layer once it has run."""
    seen: dict[str, Tensor] = {}
    hooks = (
        layer.q_proj.register_forward_hook(lambda *called: seen.update(q=called[-1])),
        layer.k_proj.register_forward_hook(lambda *called: seen.update(k=called[-1])),
        layer.v_proj.register_forward_hook(lambda *called: seen.update(v=called[-1])),
        layer.attn_sub_norm.register_forward_pre_hook(lambda _, args: seen.update(out=args[0])),
    )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _gated(layer: Any) -> Iterator[GatedParts]:
    for name in getattr(layer, "brought", ()):
        if isinstance(parts := getattr(layer, name), GatedParts):
            yield parts


def _layers(model: Any) -> Any:
    return model.model.layers
