"""Int8Weight: a matrix in eight bits a weight, with a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_matrix,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.common.linear import FLOATS

_LEVELS = 127
# the widest row whose integer sums with planes of 7 bits and a sign cannot overflow int32
_MOST_COLUMNS = (2**31 - 1) // (_LEVELS * 128)
# rows that are quantised at a time: what they need beside the result stays small
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A matrix [N, K]; the weights are about ``codes * scale[:, None]``.

    Attributes:
        codes: int8 [N, K], contiguous, -127 to 127.
        scale: float32 [N], on the device of ``codes``.

    Raises:
        TypeError: ``codes`` or ``scale`` is no tensor of its dtype.
        ValueError: shapes do not fit, or the tensors are on different devices.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        check_tensor("codes", self.codes)
        check_dtype("codes", self.codes, torch.int8)
        check_matrix("codes", self.codes)
        N, K = self.codes.shape
        if K > _MOST_COLUMNS:
            raise ValueError(f"`codes`: expected [N K] with K up to {_MOST_COLUMNS}, got {K}")
        check_tensor("scale", self.scale)
        check_dtype("scale", self.scale, torch.float32)
        check_shape("scale", self.scale, "N", N=N)
        check_device("scale", self.scale, self.codes.device)
        # a frozen dataclass: kernels read both without strides
        object.__setattr__(self, "codes", self.codes.contiguous())
        object.__setattr__(self, "scale", self.scale.contiguous())

    @classmethod
    def from_dense(cls, weight: Tensor) -> Int8Weight:
        """Quantise each row by its largest magnitude, rounding half to even.

        Args:
            weight: [N, K] float16, bfloat16 or float32.

        Raises:
            TypeError: ``weight`` is no float tensor.
            ValueError: wrong shape, or a weight that is not finite.
        """
        check_tensor("weight", weight)
        check_dtype("weight", weight, *FLOATS)
        check_matrix("weight", weight)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        parts = (t.split(_ROWS_AT_ONCE) for t in (weight.detach(), codes, scale))
        for rows, row_codes, row_scale in zip(*parts):
            wide = rows.float()
            # a row of zeros keeps a scale that can be divided by
            row_scale.copy_(wide.abs().amax(1).clamp_min(1e-30) / _LEVELS)
            row_codes.copy_((wide / row_scale[:, None]).round().clamp(-_LEVELS, _LEVELS))
        if not torch.isfinite(scale).all().item():
            raise ValueError("`weight`: expected finite weights, got infinity or NaN")
        return cls(codes, scale)

    @property
    def shape(self) -> tuple[int, int]:
        """Size of the matrix, (N, K)."""
        N, K = self.codes.shape
        return N, K

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.codes.device

    def to(self, device: torch.device | str) -> Int8Weight:
        """Return the same weight on ``device``."""
        return Int8Weight(self.codes.to(device), self.scale.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights [N, K] in ``dtype``."""
        return (self.codes * self.scale[:, None]).to(dtype)
