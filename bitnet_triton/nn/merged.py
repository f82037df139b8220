"""Several packed linears with the same input as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

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
        self._seen: list[tuple[dict[str, Any], Tensor, Tensor, int]] = []
        self._merged: MergedTernaryWeight
        self._merge()

    def __reduce__(self) -> tuple:
        # merged anew by whoever reads it: a pickle would not keep views together
        return MergedLinears, self._layers

    # what inference mode creates could never be saved for a backward again
    @torch.inference_mode(False)
    def _merge(self) -> MergedTernaryWeight:
        layers = self._layers
        weights = [layer.ternary_weight for layer in layers]
        if [id(layer.weight) for layer in layers] == [id(weight) for _, weight, *_ in self._seen]:
            # they are views still, and only scales are new
            scale = torch.cat([weight.scale for weight in weights])
            self._merged = replace(self._merged, scale=scale)
        elif len(layers) == 1:
            (alone,) = weights
            # one alone needs no copy
            packed = alone.packed.contiguous()
            self._merged = MergedTernaryWeight(packed, alone.scale, packed.shape[:1])
        else:
            self._merged = MergedTernaryWeight.merge(weights)
            for layer, part in zip(layers, self._merged.parts()):
                layer.weight = part.packed
        self._seen = [
            (layer._buffers, layer.weight, layer.weight_scale, _version(layer.weight_scale))
            for layer in layers
        ]
        return self._merged

    def is_of(self, layers: Sequence[nn.Module]) -> bool:
        """Tell whether it merges these layers."""
        return len(layers) == len(self._layers) and all(map(is_, layers, self._layers))

    def weight(self) -> MergedTernaryWeight:
        """Return the matrix, merged anew if a buffer of a linear is another one than before."""
        compiling = torch.compiler.is_compiling()
        for buffers, weight, scale, version in self._seen:
            if buffers["weight"] is not weight or buffers["weight_scale"] is not scale:
                return self._merge()
            if not compiling and _version(scale) != version:
                return self._merge()
        return self._merged


def _version(tensor: Tensor) -> int:
    """Return how often a tensor has been written to; those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
