"""Strided attention: latest keys and strides (arXiv:1904.10509, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.masked import MaskMode
from bitnet_triton.kernels import Mask


@dataclass(frozen=True)
class Strided(MaskMode):
    """The latest keys, and every so-many-th before them.

    Attributes:
        block: how many of the latest keys a query sees, itself included, and the stride before.
    """

    block: int

    def __post_init__(self) -> None:
        check_number("block", self.block, 1)

    @property
    def mask(self) -> Mask:
        """Latest keys and strides."""
        return Mask(pattern="strided", block=self.block)
