"""A cache layer that keeps everything, with something beside its keys that is made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitnet_triton.cache.growing import GrowingLayer


class FollowingLayer(GrowingLayer):
    """Keys and values, and what a subclass makes of the keys, which goes where they go.

    Anybody may replace the keys. What was made of them counts as long as they are those that the
    layer has left there itself: it notes them after each change of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: Tensor | None = None  # the keys after our own last change of them

    @property
    def is_known(self) -> bool:
        """Whether the keys are those after the layer's own last change."""
        return self.keys is self._known

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._known = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx`` [B], for beam search."""
        is_known = self.is_known
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_rows(lambda t: t.index_select(0, beam_idx.to(t.device)), is_known)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        is_known = self.is_known
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda t: torch.repeat_interleave(t, repeats, dim=0), is_known)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows ``indices``."""
        is_known = self.is_known
        super().batch_select_indices(indices if self.keys is None else indices.to(self.keys.device))
        self._change_rows(lambda t: t[indices.to(t.device)], is_known)

    def _change_rows(self, change: Callable[[Tensor], Tensor], is_known: bool) -> None:
        """Follow a change of the rows, which has been made of the keys.

        Args:
            change: makes it of a tensor of rows.
            is_known: whether the keys were known before it.
        """
        self._keep(is_known)

    def _keep(self, is_known: bool) -> None:
        """Note the keys after a change of our own, if they were known before it."""
        if is_known:
            self._known = self.keys
