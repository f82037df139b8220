"""tl.dot_scaled: products of microscaled blocks, computed in float."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_triton.triton_cpu.emit.accumulate import accumulator, finish
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.dispatch import handles
from bitnet_triton.triton_cpu.emit.elements import element
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.ir import Op, Value

# MLIR's enumeration of element types; the others have a tensor type of their own
_E2M1 = 4


@dataclass(frozen=True)
class _Operand:
    """One side: values with the summed dimension ``along``, and scales [rows, depth / block]."""

    values: Value
    scales: Value | None
    along: int
    two_in_a_byte: bool
    packed_along_depth: bool


@handles("tt.dot_scaled")
def _dot_scaled(emitter: Emitter, op: Op) -> None:
    a, b, c, *scales = op.operands
    has_a, has_b = op.integers("operandSegmentSizes")[3:5]
    left = _Operand(
        a, scales[0] if has_a else None, 1, op.integer("a_elem_type") == _E2M1,
        op.attributes.get("lhs_k_pack", "true") == "true",
    )  # fmt: skip
    right = _Operand(
        b, scales[has_a] if has_b else None, 0, op.integer("b_elem_type") == _E2M1,
        op.attributes.get("rhs_k_pack", "true") == "true",
    )  # fmt: skip
    m, n = c.type.shape or (0, 0)
    k = _depth(left)
    name, c_sum = accumulator(emitter, op)
    with emitter.braces():
        arrays = [_expanded(emitter, left, (m, k)), _expanded(emitter, right, (k, n))]
        packed = emitter.packed_array(k, n, "float")
        emitter.write(f"pack_b<float, {k}, {n}, Sign::both>({arrays[1]}, {n}, 1, {packed});")
        emitter.write(f"dot<{m}, {n}, {k}, Sign::both>({arrays[0]}, {k}, {packed}, {name});")
    finish(emitter, op, name, c_sum)


def _depth(operand: _Operand) -> int:
    size = (operand.values.type.shape or (0, 0))[operand.along]
    return size * (2 if operand.two_in_a_byte and operand.packed_along_depth else 1)


def _expanded(emitter: Emitter, operand: _Operand, shape: tuple[int, int]) -> str:
    """Write one side to an array of floats, scales applied."""
    array = emitter.array(shape[0] * shape[1], "float", "scaled")
    depth = shape[operand.along]
    packed_dim = operand.along if operand.packed_along_depth else 1 - operand.along

    def body(nest: Nest, index: Index) -> None:
        place = list(index)
        if operand.two_in_a_byte:
            place[packed_dim] = f"({index[packed_dim]} / 2)"
        code = element(emitter, operand.values, (place[0], place[1]), nest)
        value = f"float({code})"
        if operand.two_in_a_byte:
            value = f"e2m1({code}, {index[packed_dim]} % 2)"
        if operand.scales is not None:
            block = depth // (operand.scales.type.shape or (1, 1))[1]
            at = (index[1 - operand.along], f"({index[operand.along]} / {block})")
            scale = element(emitter, operand.scales, at, nest)
            kind = c_type(operand.scales.type)
            value += f" * {f'e8m0({scale})' if kind == 'int8_t' else f'float({scale})'}"
        nest.statement(f"{array}[({index[0]}) * {shape[1]} + {index[1]}] = {value};")

    write_loops(emitter, shape, body)
    return array
