"""Layers with parameters, built from ops."""

from bitnet_triton.nn.bit_linear import BitLinear, PackedBitLinear
from bitnet_triton.nn.head import (
    Int8Head,
    OutputHead,
    quantize_head,
    unquantize_head,
    use_output_head,
)
from bitnet_triton.nn.merged import MergedLinears
from bitnet_triton.nn.norm import RMSNorm

__all__ = [
    "BitLinear",
    "Int8Head",
    "MergedLinears",
    "OutputHead",
    "PackedBitLinear",
    "RMSNorm",
    "quantize_head",
    "unquantize_head",
    "use_output_head",
]
