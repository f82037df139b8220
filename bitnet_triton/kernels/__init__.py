"""WHAT is computed: the public ops."""

from bitnet_triton.kernels.dense_linear import dense_linear
from bitnet_triton.kernels.dense_linear.op import DENSE_FWD
from bitnet_triton.kernels.packing import TernaryWeight
from bitnet_triton.kernels.quantize import quantize_activations, quantize_weight
from bitnet_triton.kernels.quantize.op import ACTIVATIONS_FWD, WEIGHT_STATS
from bitnet_triton.kernels.ternary_linear import bit_linear, ternary_linear
from bitnet_triton.kernels.ternary_linear.launchers import (
    BIT_BWD_DWEIGHT,
    BIT_BWD_DX,
    BIT_FWD,
    TERNARY_BWD,
    TERNARY_FWD,
)

# op -> backend -> implementation: what `bitnet-triton doctor` reports on
IMPLEMENTATIONS = {
    "quantize_activations": ACTIVATIONS_FWD,
    "weight_stats": WEIGHT_STATS,
    "ternary_linear": TERNARY_FWD,
    "ternary_linear_bwd": TERNARY_BWD,
    "dense_linear": DENSE_FWD,
    "bit_linear": BIT_FWD,
    "bit_linear_bwd_dx": BIT_BWD_DX,
    "bit_linear_bwd_dweight": BIT_BWD_DWEIGHT,
}

__all__ = [
    "IMPLEMENTATIONS",
    "TernaryWeight",
    "bit_linear",
    "dense_linear",
    "quantize_activations",
    "quantize_weight",
    "ternary_linear",
]
