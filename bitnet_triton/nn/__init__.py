"""Layers with parameters, built from ops."""

from bitnet_triton.nn.bit_linear import BitLinear, PackedBitLinear

__all__ = ["BitLinear", "PackedBitLinear"]
