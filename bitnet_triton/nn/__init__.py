"""Layers with parameters, built from ops."""

from bitnet_triton.nn.bit_linear import BitLinear, PackedBitLinear
from bitnet_triton.nn.head import OutputHead, use_output_head
from bitnet_triton.nn.merged import MergedLinears

__all__ = ["BitLinear", "MergedLinears", "OutputHead", "PackedBitLinear", "use_output_head"]
