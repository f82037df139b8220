"""How MLIR's scalar types and constants look in C++."""

from __future__ import annotations

import math
import struct

from bitnet_triton.triton_cpu.ir import Type, UnsupportedOperation

_SIGNED = {
    "i1": "bool", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t",
    "index": "int64_t", "f16": "f16", "bf16": "bf16", "f32": "float", "f64": "double",
    "f8E4M3FN": "fp8e4nv", "f8E5M2": "fp8e5", "f8E4M3FNUZ": "fp8e4b8", "f8E5M2FNUZ": "fp8e5b16",
}  # fmt: skip
_UNSIGNED = {
    "i1": "bool", "i8": "uint8_t", "i16": "uint16_t", "i32": "uint32_t", "i64": "uint64_t",
    "index": "uint64_t",
}  # fmt: skip
BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "index": 64}
FLOATS = frozenset({"f16", "bf16", "f32", "f64"})
_HEX_FLOATS = {
    "f64": ("d", "Q", 0),
    "f32": ("f", "I", 0),
    "f16": ("e", "H", 0),
    "bf16": ("f", "I", 16),
}


def c_type(type_: Type) -> str:
    """Return the C++ type of one element."""
    if type_.pointer:
        return _SIGNED.get(type_.elem, "void") + "*"
    if type_.elem not in _SIGNED:
        raise UnsupportedOperation(f"values of type `{type_.elem}` are not supported")
    return _SIGNED[type_.elem]


def unsigned(elem: str) -> str:
    """Return the unsigned C++ integer as wide as ``elem``."""
    return _UNSIGNED[elem]


def wrapping(elem: str) -> str:
    """Return the unsigned type to compute in so that ``elem`` wraps around.

    Narrow types are promoted to int, whose overflow is undefined: 65535 * 65535, for instance.
    """
    return "uint64_t" if elem in ("i64", "index") else "uint32_t"


def literal(attribute: str, type_: Type) -> str:
    """Return a constant (``0 : i32``, ``dense<1.0> : tensor<4xf32>``) as a C++ expression."""
    text = attribute.rpartition(" : ")[0].strip() or attribute
    text = text.removeprefix("dense<").removesuffix(">") if text.startswith("dense<") else text
    if text in ("true", "false"):
        return text
    if text.startswith("["):
        raise UnsupportedOperation("constants whose elements differ are not supported")
    if type_.elem in FLOATS:
        return _float_literal(text, type_.elem)
    if type_.elem not in _UNSIGNED:
        return f"bitcast<{c_type(type_)}>(uint8_t({text}))"
    if int(text) == -(2**63):  # has no literal of its own
        return "INT64_MIN"
    return f"{c_type(type_)}({int(text)}{'LL' if type_.elem == 'i64' else ''})"


def _float_literal(text: str, elem: str) -> str:
    if text.startswith("0x"):
        code, bits, shift = _HEX_FLOATS[elem]
        number = struct.unpack(code, struct.pack(bits, int(text, 16) << shift))[0]
    else:
        number = float(text)
    name = c_type(Type(None, elem))
    if math.isnan(number):
        return f'{name}(__builtin_nanf(""))'
    if math.isinf(number):
        return f"{name}({'-' if number < 0 else ''}__builtin_inff())"
    return f"{name}({number!r}{'' if elem == 'f64' else 'f'})"
