"""Several packed linears with the same input as one product."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from bitnet_triton.kernels import MergedTernaryWeight
from bitnet_triton.nn.bit_linear import PackedBitLinear


class _Seen(NamedTuple):
    """The buffers of a linear when its weight was merged."""

    buffers: dict[str, Any]
    weight: Tensor
    weight_address: int
    scale: Tensor
    scale_address: int
    scale_memory: _Memory
    scale_state: Any

    @classmethod
    def of(cls, layer: PackedBitLinear) -> _Seen:
        weight, scale = layer.weight, layer.weight_scale
        memory = _Memory(scale)
        return cls(
            layer._buffers, weight, _address(weight), scale, _address(scale), memory, memory.state()
        )

    def is_current(self) -> bool:
        """Tell whether the buffers are the same ones, in the same memory, with the same scale."""
        weight, scale = self.buffers["weight"], self.buffers["weight_scale"]
        if weight is not self.weight or scale is not self.scale:
            return False
        if torch.compiler.is_compiling():
            return True
        return (
            _address(weight) == self.weight_address
            and _address(scale) == self.scale_address
            and self.scale_memory.state() == self.scale_state
        )


class _Memory:
    """What tells whether a scale has been written to; while it lives, none else has its address.

    The value itself, on a CPU. To read it waits for a GPU: there, writes are counted as PyTorch
    does it, which leaves out those through ``.data`` and those of inference mode.
    """

    def __init__(self, scale: Tensor) -> None:
        self._scale = scale.detach()
        has_value = type(scale) is Tensor and scale.is_cpu
        # by NumPy: a read by PyTorch would be recorded, as every operation
        self._bytes = scale.detach().view(-1).view(torch.uint8).numpy() if has_value else None
        self._versions = None if has_value or scale.is_inference() else scale

    def state(self) -> Any:
        """Return what is equal as long as the scale is."""
        if self._bytes is not None:
            return self._bytes.tobytes()
        return None if self._versions is None else self._versions._version


class MergedLinears:
    """The weights of packed linears below one another in one matrix, in which theirs lie.

    The linears stay what they are: their state dict and their own forward read the same memory,
    each a tensor with a storage of its own, which begins and ends where the tensor does. Whoever
    saves, copies or compares tensors by their storage sees weights that share nothing. The matrix
    follows the linears when they move, are loaded again, or get new buffers or new memory.

    Args:
        *layers: without bias and without a norm, with the same input width.
    """

    def __init__(self, *layers: PackedBitLinear) -> None:
        self._layers = layers
        self._seen: list[_Seen] = []
        self._merged: MergedTernaryWeight
        self._merge()

    def __reduce__(self) -> tuple:
        # merged anew by whoever reads it: a pickle would not keep the parts together
        return MergedLinears, self._layers

    # what inference mode creates could never be saved for a backward again
    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self) -> MergedTernaryWeight:
        layers = self._layers
        weights = [layer.ternary_weight for layer in layers]
        if len(layers) == 1:
            (alone,) = weights
            # one alone needs no copy, but an alias, which keeps its memory from being used again
            packed = alone.packed.detach().contiguous()
            self._merged = MergedTernaryWeight(packed, alone.scale, packed.shape[:1])
        elif self._lie_in_place():
            # only scales are new
            scale = torch.cat([weight.scale for weight in weights])
            self._merged = MergedTernaryWeight(self._merged.packed, scale, self._merged.rows)
        else:
            self._merged = MergedTernaryWeight.merge(weights)
            for layer, part in zip(layers, self._merged.parts()):
                layer.weight = _alone(part.packed)
        self._seen = [_Seen.of(layer) for layer in layers]
        return self._merged

    def is_of(self, layers: Sequence[nn.Module]) -> bool:
        """Tell whether it merges these layers."""
        return len(layers) == len(self._layers) and all(map(is_, layers, self._layers))

    def _lie_in_place(self) -> bool:
        """Tell whether the weights are the parts of the matrix still."""
        return bool(self._seen) and all(
            layer.weight is seen.weight and _address(layer.weight) == seen.weight_address
            for layer, seen in zip(self._layers, self._seen)
        )

    def is_current(self) -> bool:
        """Tell whether the matrix is what the linears hold now; if not, ``weight`` merges anew."""
        return all(seen.is_current() for seen in self._seen)

    def weight(self) -> MergedTernaryWeight:
        """Return the matrix, merged anew if the linears hold something else than before."""
        # a loop, not is_current(): this runs for every product of a forward
        for seen in self._seen:
            if not seen.is_current():
                return self._merge()
        return self._merged

    def release(self) -> None:
        """Give each linear memory of its own; the matrix is let go with this object."""
        with torch.inference_mode(False), torch.no_grad():
            if len(self._layers) > 1 and self._lie_in_place():
                for layer in self._layers:
                    layer.weight = layer.weight.clone()


def _alone(part: Tensor) -> Tensor:
    """Return a part of a matrix as a tensor whose storage is the part: the same memory."""
    if part.device.type == "meta" or type(part) is not Tensor:
        return part.clone()  # there is no memory to share
    # by DLPack: the one way that keeps the whole alive, on every device that has memory
    return from_dlpack(to_dlpack(part))


def _address(tensor: Tensor) -> int:
    """Return where a tensor lies; those without memory lie nowhere."""
    return tensor.data_ptr() if type(tensor) is Tensor else 0
