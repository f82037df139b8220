"""Feature maps of linear attention: what stands in place of exp(q . k), as phi(q) . phi(k).

All give features that are not negative, for ``linear_attention(..., normalize=True, scale=1.0)``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def elu_plus_one(x: Tensor) -> Tensor:
    """Return elu(x) + 1 (arXiv:2006.16236, eq. 7): positive, and has a gradient everywhere."""
    return F.elu(x) + 1


class Performer(nn.Module):
    """Random features whose products are exp(q . k / sqrt(D)) on average (arXiv:2009.14794).

    ``phi(x) = exp(w_i . x' - |x'|^2 / 2) / sqrt(F)`` with x' = x D^-1/4, eq. 7 there. The rows w_i
    are as long as Gaussian ones, and orthogonal in blocks of D of them: each block is uniform over
    all rotations, since its QR decomposition is the one whose R has a positive diagonal.

    Args:
        D: size of a head.
        features: F. Default: D ln D, rounded up to a multiple of 16.
        seed: of the rows; equal seeds give equal rows on every device.

    Attributes:
        rows: float32 [F D]; a buffer that is saved. ``redraw`` changes it.

    Raises:
        ValueError: ``D`` or ``features`` is not positive.
    """

    rows: Tensor

    def __init__(self, D: int, features: int | None = None, *, seed: int = 0) -> None:
        super().__init__()
        if D < 1:
            raise ValueError(f"`D`: expected at least 1, got {D}")
        if features is None:
            features = -(-int(D * math.log(D) + 1) // 16) * 16
        if features < 1:
            raise ValueError(f"`features`: expected at least 1, got {features}")
        self.D, self.features = D, features
        self.register_buffer("rows", orthogonal_rows(features, D, seed=seed))

    def redraw(self, seed: int) -> None:
        """Take other rows; what a state holds was made with those from before."""
        self.rows.copy_(orthogonal_rows(self.features, self.D, seed=seed))

    def matrix(self) -> Tensor:
        """Return what x is multiplied by, [F D], where it lies."""
        return self.rows

    def forward(self, x: Tensor, *, queries: bool = False) -> Tensor:
        """Map x [..., D] to features [..., F] in its dtype, computed in float32.

        Args:
            x: queries or keys.
            queries: divide each row by its largest feature, which the normaliser divides out: rows
                of any length stay finite. Keys have no such factor: it would not be causal.
        """
        wide = x.float() * self.D**-0.25
        logits = wide @ self.rows.float().t() - wide.square().sum(-1, keepdim=True) / 2
        if queries:
            logits = logits - logits.amax(-1, keepdim=True).detach()
        return (logits.exp() * self.features**-0.5).to(x.dtype)


def orthogonal_rows(features: int, D: int, *, seed: int) -> Tensor:
    """Return float32 [features D], each row Gaussian; those of a block of D are orthogonal."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian() -> Tensor:
        return torch.randn(D, D, generator=generator, dtype=torch.float64, device="cpu")

    blocks = []
    for _ in range(-(-features // D)):
        # without the signs Q is not uniform: Householder's reflections prefer some directions
        Q, R = torch.linalg.qr(gaussian())
        lengths = gaussian().norm(dim=1, keepdim=True)
        blocks.append(lengths * (Q * R.diagonal().sign()).t())
    return torch.cat(blocks)[:features].float()


class Hedgehog(nn.Module):
    """A learned map that mimics softmax (arXiv:2402.04347): softmax([W x; -W x]) over features.

    Args:
        heads: each has a matrix of its own.
        D: size of a head; there are 2 D features.

    Attributes:
        weight: [heads D D], the identity at first.
    """

    def __init__(self, heads: int, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(D).repeat(heads, 1, 1))

    def matrix(self) -> Tensor:
        """Return what x is multiplied by, [heads D D], where it lies, without gradient."""
        return self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B T heads D] to features [B T heads 2 D] in its dtype."""
        y = torch.einsum("bthd,hed->bthe", x, self.weight.to(x.dtype))
        return torch.cat((y, -y), -1).softmax(-1, dtype=torch.float32).to(x.dtype)
