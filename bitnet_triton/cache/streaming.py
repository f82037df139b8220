"""A window and the first tokens, with rotary positions that start again (arXiv:2309.17453)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitnet_triton.cache.memory import Call
from bitnet_triton.cache.sinks import SinkWindowLayer

# Streaming positions start again after so many tokens: angles in float32 stay exact, keys are
# turned rarely, and each key at most once more than it would be in any case
REBASE_EVERY = 4096


class StreamingLayer(SinkWindowLayer):
    """The same, with rotary positions that stay small however long a text grows.

    Keys arrive rotated. Distances among the latest tokens are all that counts, so from time to time
    ``rebase`` turns them back together, and the tokens to come go on from there.

    Attributes:
        shift: int64 [B], columns minus padding minus rotary position, for each row; None: 0.
    """

    rebases = True

    def __init__(self, recent: int, sinks: int) -> None:
        super().__init__(recent, sinks)
        self.shift: Tensor | None = None
        self.columns_at_rebase = 0

    def begin(self, call: Call) -> None:
        """Note the padding of a call, and let positions start again if it is time to."""
        super().begin(call)
        if call.rebase_to is None or call.frequencies is None:
            return
        if self.columns - self.columns_at_rebase >= max(REBASE_EVERY, call.rebase_to - 1):
            self.rebase(call.rebase_to, call.frequencies)

    def rebase(self, position: int, frequencies: Tensor) -> None:
        """Give the next token ``position``, where it would have a later one, and turn keys along.

        Args:
            position: of the next token; more than ``kept``, so that the first tokens, which keep
                their positions, have left every window.
            frequencies: [D / 2], angles of the rotary embedding for each position.
        """
        self.columns_at_rebase = self.columns
        if not self.is_initialized:
            return
        keys, values = self.keys, self.values
        B, device = keys.shape[0], keys.device
        shift = (
            torch.zeros(B, dtype=torch.long, device=device) if self.shift is None else self.shift
        )
        left = 0 if self.leftpad is None else self.leftpad.to(device)
        excess = (self.columns - left - shift - position).clamp_min(0)  # [B]
        padding = 0 if self.leftpad is None else self._held_padding(self.held)[:, None]
        slot = torch.arange(self.held, device=device) - padding
        steps = torch.where(slot < self.sinks, 0, excess[:, None])
        turned = turn_back(keys, steps, frequencies)
        if self._is_stored() and self._may_write(turned):
            keys.copy_(turned)  # in place: a recorded step finds it where it was
        else:
            self.keys, self.values = turned, values
        self.shift = shift + excess

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.shift, self.columns_at_rebase = None, 0

    def _change_rows(self, change: Any) -> None:
        super()._change_rows(change)
        if self.shift is not None:
            self.shift = change(self.shift)


def turn_back(keys: Tensor, steps: Tensor, frequencies: Tensor) -> Tensor:
    """Move keys [B Hk T D] back by ``steps`` [B T] positions of their rotary embedding."""
    angle = (steps[..., None].float() * frequencies.float())[:, None]  # [B 1 T D / 2]
    cos, sin = angle.cos(), angle.sin()
    first, second = keys.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
    return turned.to(keys.dtype)
