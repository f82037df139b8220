"""Several packed linears with the same input as one product."""

from __future__ import annotations

from typing import Any

import torch

from bitnet_triton.kernels import MergedTernaryWeight
from bitnet_triton.nn.bit_linear import PackedBitLinear


class MergedLinears:
    """The weights of packed linears below one another in one matrix, of which theirs are views.

    The linears stay what they are: their state dict and their own forward read the same memory. It
    follows them when they move, are loaded again or get new buffers.

    Args:
        *layers: without bias and without a norm, with the same input width.
    """

    def __init__(self, *layers: PackedBitLinear) -> None:
        self._layers = layers
        self._merge()

    # what inference mode creates could never be saved for a backward again
    @torch.inference_mode(False)
    def _merge(self) -> MergedTernaryWeight:
        layers = self._layers
        weights = [layer.ternary_weight for layer in layers]
        self._merged = MergedTernaryWeight.merge(weights)
        if len(layers) > 1:
            for layer, part in zip(layers, self._merged.parts()):
                layer.weight = part.packed
        else:
            # one alone needs no copy
            self._merged = MergedTernaryWeight(
                weights[0].packed.contiguous(), self._merged.scale, self._merged.rows
            )
        self._seen = [
            (layer._buffers, layer.weight, layer.weight_scale, _version(layer.weight_scale))
            for layer in layers
        ]
        return self._merged

    def weight(self) -> MergedTernaryWeight:
        """Return the matrix, merged anew if a buffer of a linear is another one than before."""
        compiling = torch.compiler.is_compiling()
        for buffers, weight, scale, version in self._seen:
            if buffers["weight"] is not weight or buffers["weight_scale"] is not scale:
                return self._merge()
            if not compiling and _version(scale) != version:
                return self._merge()
        return self._merged


def _version(tensor: Any) -> int:
    """Return how often a tensor has been written to; those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
