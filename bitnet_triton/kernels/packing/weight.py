"""TernaryWeight: a ternary matrix in two bits a weight, as the ops read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_dtype, check_matrix, check_tensor
from bitnet_triton.kernels.packing.reference import (
    CODES_PER_BYTE,
    has_invalid_code,
    pack_codes,
    unpack_codes,
)


@dataclass(frozen=True, eq=False)
class TernaryWeight:
    """A matrix [N, K] of codes in -1..1 and one scale; the weights are about codes * scale.

    Build one with ``from_codes`` or ``from_checkpoint``, which check their arguments.

    Attributes:
        packed: uint8 [N / 4, K], private layout.
        scale: float32 [1], on the device of ``packed``.
    """

    packed: Tensor
    scale: Tensor

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor | float) -> TernaryWeight:
        """Pack codes.

        Args:
            codes: [N, K] int8, values -1, 0 or 1; N a multiple of 4.
            scale: positive and finite, a number or a tensor of one element.

        Raises:
            TypeError: ``codes`` is not an int8 tensor.
            ValueError: wrong shape, a code outside -1..1, a scale that is not positive and finite.
        """
        check_tensor("codes", codes)
        check_dtype("codes", codes, torch.int8)
        check_matrix("codes", codes)
        if codes.shape[0] % CODES_PER_BYTE:
            raise ValueError(
                f"`codes`: expected [N K] with N a multiple of {CODES_PER_BYTE}, "
                f"got {list(codes.shape)}"
            )
        if codes.min() < -1 or codes.max() > 1:
            raise ValueError(
                "`codes`: expected values -1, 0 or 1, "
                f"got values from {codes.min().item()} to {codes.max().item()}"
            )
        return cls(pack_codes(codes), checked_scale(scale, codes.device))

    @classmethod
    def from_checkpoint(cls, packed: Tensor, scale: Tensor | float) -> TernaryWeight:
        """Take a packed matrix in the layout of published checkpoints.

        Args:
            packed: [N / 4, K] uint8, four rows in a byte, none of them with the value 3.
            scale: the multiplier of the codes, positive and finite: ``weight_scale`` of an
                ``autobitlinear`` checkpoint, its reciprocal for a ``bitlinear`` one.

        Raises:
            TypeError: ``packed`` is not a uint8 tensor.
            ValueError: wrong shape, a packed value of 3, a scale that is not positive and finite.
        """
        check_tensor("packed", packed)
        check_dtype("packed", packed, torch.uint8)
        check_matrix("packed", packed, "N/4 K")
        if has_invalid_code(packed):
            raise ValueError("`packed`: expected codes 0, 1 or 2 in every two bits, got a 3")
        return cls(packed.contiguous(), checked_scale(scale, packed.device))

    @property
    def shape(self) -> tuple[int, int]:
        """Size of the unpacked matrix, (N, K)."""
        rows, K = self.packed.shape
        return rows * CODES_PER_BYTE, K

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.packed.device

    def codes(self) -> Tensor:
        """Return the int8 codes [N, K]."""
        return unpack_codes(self.packed)

    def to(self, device: torch.device | str) -> TernaryWeight:
        """Return the same weight on ``device``."""
        return TernaryWeight(self.packed.to(device), self.scale.to(device))


def checked_scale(scale: Tensor | float, device: torch.device) -> Tensor:
    """Return ``scale`` as float32 [1] on ``device``; raise ValueError unless positive, finite."""
    value = torch.as_tensor(scale, dtype=torch.float32).detach().reshape(-1).to(device)
    if value.numel() != 1:
        raise ValueError(f"`scale`: expected one element, got {value.numel()}")
    if not (torch.isfinite(value) & (value > 0)).item():
        raise ValueError(f"`scale`: expected a positive finite number, got {value.item()}")
    return value
