"""StreamingLLM: sinks and a window, with positions counted inside the cache (arXiv:2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import check_served, masked_attention
from bitnet_triton.attention.mode import Kept, Mode, Step, StepLayer, StepTensors
from bitnet_triton.cache import Memory, StreamingLayer
from bitnet_triton.kernels import Mask, merge_attention, rotary_angles
from bitnet_triton.kernels.flash_attention.operands import SinkQuery


@dataclass(frozen=True)
class Streaming(Mode):
    """The first tokens and the latest ones, as if there had been nothing between them.

    Token p of a text attends to its window and to the sinks as token ``min(p, sinks + window - 1)``
    of the ``sinks + window`` tokens that it sees. Among the keys of the window that changes no
    distance; to the sinks it does. So a text may be endless, and what left the window is gone.

    Attributes:
        window: keys that each query sees, itself included.
        sinks: first tokens of the text that every query sees as well.
    """

    counts_positions: ClassVar[bool] = True

    window: int
    sinks: int = 4

    def __post_init__(self) -> None:
        check_number("window", self.window, 1)
        check_number("sinks", self.sinks, 1)

    @property
    def kept(self) -> Kept:
        """The window of the next token without itself, and the sinks."""
        return Kept(self.window - 1, self.sinks)

    @property
    def span(self) -> int:
        """The window and the sinks."""
        return self.sinks + self.window

    def memory(self, other: Mode) -> Memory:
        """Return a memory whose positions can start again, if all layers stream."""
        if not isinstance(other, Streaming):
            return super().memory(other)
        kept = self.kept | other.kept
        return StreamingLayer(kept.recent, kept.sinks)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        check_served(self, context)
        self._check(context)
        near = masked_attention(q, k, v, Mask(window=self.window), context)
        far = self._sinks(q, k, v, context)
        return merge_attention(*zip(near, far))[0]

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Write the new token into the memory; read the window, and the sinks from their place."""
        mask = Mask(window=self.window, sinks=self.sinks)
        objection = memory.decode_objection(mask, sink_query=True)
        if objection is not None:
            return objection
        last = self.sinks + self.window - 1

        def run(step: StepTensors) -> Tensor:
            q = memory.write(step.heads, step.cos, step.sin, step.places)
            turned = SinkQuery(step.heads, step.cos, step.sin, last)
            return memory.decode(q, step.places, mask=mask, scale=layer.scale, sink_query=turned)[0]

        return run

    def _check(self, context: AttentionContext) -> None:
        if context.positions is None or context.frequencies is None:
            raise ValueError(
                "`attention`: 'streaming' turns keys to new positions: it needs a model that tells "
                "the positions and the frequencies of its rotary embedding, as BitNetForCausalLM"
            )
        if context.tokens.cu_seqlens is not None:
            raise ValueError("`position_ids`: attention 'streaming' takes no packed sequences")

    def _sinks(
        self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """Attend to the sinks that have left the window: out [B Tq H D] and lse [B H Tq].

        They are few: scores [Tq, sinks] cost less than the window's.
        """
        assert context.positions is not None
        assert context.frequencies is not None
        # where the query would stand, had the text nothing between the sinks and its window
        excess = (context.positions - (self.sinks + self.window - 1)).clamp_min(0)
        q = rotate(q, -excess, context.frequencies)
        k, v, is_visible = self._first(q, k, v, context)

        Hk = k.shape[2]
        groups = q.unflatten(2, (Hk, -1)).float()
        scores = torch.einsum("bihgd,bjhd->bhgij", groups, k.float()) * context.scale
        if context.softcap is not None:
            scores = context.softcap * torch.tanh(scores / context.softcap)
        is_visible = is_visible[:, None, None]  # [B 1 1 Tq S]
        is_empty = ~is_visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~is_visible, float("-inf")).masked_fill(is_empty, 0.0)
        weights = scores.softmax(-1).masked_fill(~is_visible, 0.0)
        out = torch.einsum("bhgij,bjhd->bihgd", weights, v.float()).flatten(2, 3)
        lse = scores.logsumexp(-1).masked_fill(is_empty.squeeze(-1), float("-inf"))
        return out.to(q.dtype), lse.flatten(1, 2)

    def _first(
        self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sinks' k and v [B S Hk D], and which of them have left which window."""
        (B, Tq), Tk = q.shape[:2], k.shape[1]
        lengths = context.tokens.lengths(q, k)
        left, used_k = lengths["leftpad_k"], lengths["seqused_k"]
        start = torch.zeros(B, 1, dtype=torch.long, device=k.device)
        if left is not None:
            start = left[:, None].long()
        used_q = context.tokens.used_q
        index = torch.arange(Tq, device=k.device) - (Tq if used_q is None else used_q[:, None])
        # of each query, counted from the first key that is no padding
        position = index + (Tk if used_k is None else used_k[:, None]) - start
        sink = torch.arange(self.sinks, device=k.device)
        is_visible = sink <= position[..., None] - self.window
        if used_q is not None:
            is_visible = is_visible & (index < 0)[..., None]
        rows = (start + sink).clamp_max(Tk - 1)[..., None, None]  # [B S 1 1]
        k, v = (t.gather(1, rows.expand(-1, -1, *t.shape[2:])) for t in (k, v))
        return k, v, is_visible


def rotate(x: Tensor, steps: Tensor, frequencies: Tensor) -> Tensor:
    """Move x [B T H D] by ``steps`` [B T] positions of a rotary embedding.

    Args:
        x: rotated already, its halves holding the two coordinates of each pair.
        steps: forward, or backward where negative.
        frequencies: [D / 2], the angle of one step.
    """
    angle = rotary_angles(steps[..., None], frequencies)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
