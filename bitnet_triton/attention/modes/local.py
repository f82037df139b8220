"""Local attention: block by block (arXiv:2507.19595)."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.masked import MaskMode
from bitnet_triton.kernels import Mask


@dataclass(frozen=True)
class Local(MaskMode):
    """Keys of the query's own block.

    Attributes:
        block: tokens in a block.
    """

    block: int

    def __post_init__(self) -> None:
        check_number("block", self.block, 1)

    @property
    def mask(self) -> Mask:
        """Block by block."""
        return Mask(pattern="local", block=self.block)
