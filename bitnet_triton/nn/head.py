"""The output head of a language model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_triton.kernels import dense_linear
from bitnet_triton.runtime.device import autocast_dtype


class OutputHead(nn.Linear):
    """``nn.Linear`` that multiplies a plain matrix, whatever the strides of its input.

    Generation asks for the logits of the last token only: ``hidden[:, -1:]``, a [B 1 K] slice with
    the strides of the whole sequence. For bfloat16 on a CPU, PyTorch multiplies such a tensor some
    fifty times slower than the same values as a matrix [B, K]. Without gradients, a few rows go
    through ``dense_linear``.

    State: ``weight`` [N, K] and ``bias`` [N], as in ``nn.Linear``.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> OutputHead:
        """Take over the parameters of ``linear``; nothing is copied."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=False)
        head.weight = linear.weight
        head.bias = linear.bias
        return head

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        rows = input.reshape(-1, self.in_features)
        if self._learns(rows) or autocast_dtype(rows.device.type) is not None:
            logits = F.linear(rows, self.weight, self.bias)
        else:
            logits = dense_linear(rows, self.weight, self.bias)
        return logits.view(*input.shape[:-1], self.out_features)

    def _learns(self, rows: Tensor) -> bool:
        return torch.is_grad_enabled() and (rows.requires_grad or self.weight.requires_grad)


def use_output_head(model: Any) -> None:
    """Replace the dense output head of a transformers model by ``OutputHead``, in place."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is nn.Linear:
        model.set_output_embeddings(OutputHead.from_linear(head))
