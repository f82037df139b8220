"""WHAT is computed: the public ops."""

from bitnet_triton.kernels.packing import TernaryWeight
from bitnet_triton.kernels.quantize import quantize_activations, quantize_weight
from bitnet_triton.kernels.ternary_linear import bit_linear, ternary_linear

__all__ = [
    "TernaryWeight",
    "bit_linear",
    "quantize_activations",
    "quantize_weight",
    "ternary_linear",
]
