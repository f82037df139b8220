"""Layers with parameters, built from ops."""

from bitnet_triton.nn.bit_linear import BitLinear, PackedBitLinear, count_packed
from bitnet_triton.nn.feature_maps import Hedgehog, Performer, elu_plus_one
from bitnet_triton.nn.head import (
    Int8Head,
    OutputHead,
    quantize_head,
    resized_head,
    unquantize_head,
    use_output_head,
)
from bitnet_triton.nn.merged import MergedLinears
from bitnet_triton.nn.norm import RMSNorm
from bitnet_triton.nn.reversible import ReversibleStack, run_reversible

__all__ = [
    "BitLinear",
    "Hedgehog",
    "Int8Head",
    "MergedLinears",
    "OutputHead",
    "PackedBitLinear",
    "Performer",
    "RMSNorm",
    "ReversibleStack",
    "count_packed",
    "elu_plus_one",
    "quantize_head",
    "resized_head",
    "run_reversible",
    "unquantize_head",
    "use_output_head",
]
