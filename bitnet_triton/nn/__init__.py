"""Layers with parameters, built from ops."""

from bitnet_triton.nn.bit_linear import BitLinear, PackedBitLinear
from bitnet_triton.nn.head import OutputHead, use_output_head

__all__ = ["BitLinear", "OutputHead", "PackedBitLinear", "use_output_head"]
