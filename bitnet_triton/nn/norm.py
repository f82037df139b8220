"""RMSNorm as a layer: one pass over memory forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitnet_triton.kernels import rms_norm


class RMSNorm(nn.Module):
    """Normalise the last dimension by its root mean square, as transformers' BitNetRMSNorm does.

    State: ``weight`` [D]. In eager mode each direction is one kernel. Under ``torch.compile`` the
    formula is traced instead, because Inductor fuses it with the residual before it.

    Args:
        hidden_size: D.
        eps: added to the mean square.
        device: where the weight is.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.variance_epsilon = eps

    @classmethod
    def from_norm(cls, norm: Any) -> RMSNorm:
        """Take over the weight of one of transformers' RMS norms; nothing is copied."""
        layer = cls(norm.weight.shape[0], norm.variance_epsilon, device=torch.device("meta"))
        layer.weight = norm.weight
        return layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [..., D] to [..., D], in the wider dtype of input and weight."""
        if not torch.compiler.is_compiling():
            return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
        wide = hidden_states.float()
        rstd = (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * (wide * rstd).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"
