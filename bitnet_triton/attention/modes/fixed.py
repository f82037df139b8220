"""Fixed attention: blocks and their summaries (arXiv:1904.10509, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.masked import MaskMode
from bitnet_triton.kernels import Mask


@dataclass(frozen=True)
class Fixed(MaskMode):
    """Keys of the query's own block, and the last ones of every block.

    Attributes:
        block: tokens in a block.
        summary: tokens at the end of each block that all later queries see.
    """

    block: int
    summary: int = 1

    def __post_init__(self) -> None:
        check_number("block", self.block, 1)
        check_number("summary", self.summary, 1)
        if self.summary > self.block:
            raise ValueError(
                f"`attention`: 'summary': expected at most the block of {self.block}, got "
                f"{self.summary}"
            )

    @property
    def mask(self) -> Mask:
        """Own block and summaries."""
        return Mask(pattern="fixed", block=self.block, summary=self.summary)
