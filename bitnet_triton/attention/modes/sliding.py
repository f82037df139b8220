"""A window of the latest keys, and the first ones (arXiv:2512.10411)."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.masked import MaskMode
from bitnet_triton.attention.mode import Kept
from bitnet_triton.kernels import Mask


@dataclass(frozen=True)
class Sliding(MaskMode):
    """A sliding window; keys keep the positions that they have in the text.

    Attributes:
        window: keys that each query sees, itself included.
        sinks: first tokens of the text that every query sees as well.
    """

    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        check_number("window", self.window, 1)
        check_number("sinks", self.sinks, 0)

    @property
    def mask(self) -> Mask:
        """The window and the sinks."""
        return Mask(window=self.window, sinks=self.sinks)

    @property
    def pages_mask(self) -> Mask | None:
        """The window and the sinks, unless a subclass attends in another way."""
        return self.mask if type(self).__call__ is MaskMode.__call__ else None

    def sees_all_of(self, length: int) -> bool:
        """No text is longer than the window."""
        return self.window >= length

    @property
    def kept(self) -> Kept:
        """The window of the next token without itself, and the sinks."""
        return Kept(self.window - 1, self.sinks)
