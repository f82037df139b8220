"""Layers with parameters, built from ops."""

from bitnet_triton.nn.bit_linear import BitLinear, PackedBitLinear
from bitnet_triton.nn.head import OutputHead, use_output_head
from bitnet_triton.nn.merged import MergedLinears
from bitnet_triton.nn.norm import RMSNorm

__all__ = [
    "BitLinear",
    "MergedLinears",
    "OutputHead",
    "PackedBitLinear",
    "RMSNorm",
    "use_output_head",
]
