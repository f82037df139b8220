from bitnet_triton.kernels.packing.reference import (
    CODES_PER_BYTE,
    has_invalid_code,
    pack_codes,
    unpack_codes,
)
from bitnet_triton.kernels.packing.weight import TernaryWeight, checked_scale

__all__ = [
    "CODES_PER_BYTE",
    "TernaryWeight",
    "checked_scale",
    "has_invalid_code",
    "pack_codes",
    "unpack_codes",
]
