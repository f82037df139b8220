"""tl.dot through the micro-kernels of include/dot.h."""

from __future__ import annotations

from bitnet_triton.triton_cpu.analyse import in_seven_bits, splat_integer, walk
from bitnet_triton.triton_cpu.emit.accumulate import HALVES, accumulator, finish
from bitnet_triton.triton_cpu.emit.arrays import store_into
from bitnet_triton.triton_cpu.emit.bytes import fill_bytes
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.dispatch import handles
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.fetches import woven, write_rest
from bitnet_triton.triton_cpu.emit.lanes import emit_vector_products
from bitnet_triton.triton_cpu.emit.quads import codes_of, quads
from bitnet_triton.triton_cpu.emit.vector_products import vector_product
from bitnet_triton.triton_cpu.emit.views import (
    View,
    address_step,
    is_listed,
    is_memory,
    listed_rows,
    matrix_view,
    rows_in_use,
    untransposed,
)
from bitnet_triton.triton_cpu.ir import Op, Value

_EIGHT_BIT_FLOATS = ("f8",)
_FLOATS = frozenset({"f32", "bf16", "f16"})
_FEW_ROWS = 4
_FEW_BYTE_ROWS = 8  # more than one block of rows would unpack what lies in fours more than once


def _operand_type(op: Op) -> str | None:
    """Return the C++ type that both operands are converted to; None for their own."""
    a, b, _ = (operand.type.elem for operand in op.operands[:3])
    if a.startswith(_EIGHT_BIT_FLOATS) and b.startswith(_EIGHT_BIT_FLOATS):
        return "bf16"  # holds every 8-bit float exactly
    result = op.results[0].type.elem
    if a != b or result == "f64" or (a == "f32" and result in HALVES):
        return c_type(op.results[0].type) if result == "f64" else "float"
    return None


def _sign(op: Op) -> str:
    if op.operands[0].type.elem != "i8":
        return "Sign::both"
    if in_seven_bits(op.operands[0]):
        return "Sign::a_u7"
    return "Sign::b_u7" if in_seven_bits(op.operands[1]) else "Sign::both"


@handles("tt.dot")
def _dot(emitter: Emitter, op: Op) -> None:
    if op.operands[0].type.rank == 3:
        _batched(emitter, op)
    elif vector_product(emitter, op) is not None:
        emit_vector_products(emitter, op)
    elif _has_few_rows(emitter, op):
        _few_rows(emitter, op)
    else:
        _matrix_product(emitter, op)
    write_rest(emitter, op)


def _has_few_rows(emitter: Emitter, op: Op) -> bool:
    """Tell whether packing the right operand would cost more than the product."""
    a, b, _ = op.operands[:3]
    (m, _), n = a.type.shape or (0, 0), (b.type.shape or (0, 0))[1]
    if m > _FEW_ROWS or n % 16 or op.results[0].type.elem != "f32" or a.type.elem not in _FLOATS:
        return False
    root, order = untransposed(emitter, _narrow(emitter, b))
    in_memory = is_memory(emitter, root) and address_step(emitter, root, order[1]) == 1
    return root.type.elem in _FLOATS and (in_memory or is_listed(emitter, root, order[1]))


def _narrow(emitter: Emitter, value: Value) -> Value:
    """Return what a matrix was widened from: the product widens it as it reads it."""
    op = value.op
    if op is None or op.name != "arith.extf" or value in emitter.held:
        return value
    return op.operands[0]


def _few_rows(emitter: Emitter, op: Op) -> None:
    a, b, _ = op.operands[:3]
    (m, k), n = a.type.shape or (0, 0), (b.type.shape or (0, 0))[1]
    name, c_sum = accumulator(emitter, op)
    with emitter.braces():
        left = matrix_view(emitter, a, unit=1)
        narrow = _narrow(emitter, b)
        root, order = untransposed(emitter, narrow)
        if is_memory(emitter, root):
            right = matrix_view(emitter, narrow, unit=1)
            views = f"{left.base}, {left.steps[0]}, {right.base}, {right.steps[0]}"
            fetch = woven(emitter, op, k, n, narrow.type)
            emitter.write(f"few_rows<{m}, {n}, {k}>({views}, {name}{fetch});")
        else:
            listed = listed_rows(emitter, root, order[1])
            views = f"{left.base}, {left.steps[0]}, {listed}"
            emitter.write(f"few_listed<{m}, {n}, {k}>({views}, {name});")
    finish(emitter, op, name, c_sum)


def _matrix_product(emitter: Emitter, op: Op) -> None:
    a, b, _ = op.operands[:3]
    (m, k), n = a.type.shape or (0, 0), (b.type.shape or (0, 0))[1]
    elem, sign = _operand_type(op), _sign(op)
    right = emitter.packed.get((b, sign))
    in_quads = quads(emitter, b) if right is None and m <= _FEW_BYTE_ROWS else None
    if in_quads is not None:
        _product_with_quads(emitter, op, in_quads)
        return
    name, c_sum = accumulator(emitter, op)
    if right is None and sum(use.name == "tt.dot" for use in b.uses) > 1:
        right = emitter.packed[b, sign] = _pack(emitter, b, sign, elem)
    with emitter.braces():
        left = _left(emitter, a, elem)
        right = right or _pack(emitter, b, sign, elem)
        # not of floats: zero times infinity is NaN
        rows = rows_in_use(emitter, a) if a.type.elem == "i8" else m
        arguments = f"{left.base}, {left.steps[0]}, {right}, {name}, {rows}"
        emitter.write(f"dot<{m}, {n}, {k}, {sign}>({arguments});")
    finish(emitter, op, name, c_sum)


def _product_with_quads(emitter: Emitter, op: Op, in_quads: Value) -> None:
    a, b, start = op.operands[:3]
    (m, k), n = a.type.shape or (0, 0), (b.type.shape or (0, 0))[1]
    is_fresh = splat_integer(start) == 0
    if is_fresh:
        result = op.results[0]
        name, c_sum = emitter.array(result.type.size, "int32_t", result.name or "sums"), "int32_t"
    else:
        name, c_sum = accumulator(emitter, op)
    with emitter.braces():
        left = _left(emitter, a, None)
        arguments = f"{left.base}, {left.steps[0]}, {codes_of(emitter, in_quads)}, {name}"
        sizes = f"{m}, {n}, {k}, {_sign(op)}, {str(is_fresh).lower()}"
        emitter.write(f"dot_quads<{sizes}>({arguments});")
    finish(emitter, op, name, c_sum)


def _left(emitter: Emitter, a: Value, elem: str | None) -> View:
    """Return the left operand with its rows contiguous: in memory, or computed into an array."""
    root, _ = untransposed(emitter, a)
    if emitter.buffer(root) is None and not is_memory(emitter, root):
        filled = fill_bytes(emitter, a)
        if filled is not None:
            return filled
    return matrix_view(emitter, a, unit=1, c_elem=elem)


def _pack(emitter: Emitter, b: Value, sign: str, elem: str | None) -> str:
    """Pack the right operand for the micro-kernel; return the array's name."""
    k, n = b.type.shape or (0, 0)
    c_elem = elem or c_type(b.type)
    packed = emitter.packed_array(k, n, c_elem)
    in_quads = quads(emitter, b)
    with emitter.braces():
        if in_quads is not None:
            emitter.write(f"pack_quads<{k}, {n}, {sign}>({codes_of(emitter, in_quads)}, {packed});")
            return packed
        view = matrix_view(emitter, b, c_elem=elem)
        arguments = f"{view.base}, {view.steps[0]}, {view.steps[1]}, {packed}"
        emitter.write(f"pack_b<{c_elem}, {k}, {n}, {sign}>({arguments});")
    return packed


def pack_ahead(emitter: Emitter, loop: Op) -> None:
    """Before a loop: pack the right operands that are the same in every trip."""
    for op in walk([block for region in loop.regions for block in region]):
        if op.name != "tt.dot" or op.operands[0].type.rank != 2:
            continue
        b, sign = op.operands[1], _sign(op)
        outside = b.block is not None and emitter.block.inside(b.block)
        if outside and (b, sign) not in emitter.packed and vector_product(emitter, op) is None:
            emitter.packed[b, sign] = _pack(emitter, b, sign, _operand_type(op))


def _batched(emitter: Emitter, op: Op) -> None:
    a, b, _ = op.operands[:3]
    (batch, m, k), n = a.type.shape or (0, 0, 0), (b.type.shape or (0, 0, 0))[2]
    elem, sign = _operand_type(op), _sign(op)
    name, c_sum = accumulator(emitter, op)
    c_elem = elem or c_type(a.type)
    arrays = []
    for operand in (a, b):
        array = emitter.array(operand.type.size, c_elem, "batch")
        store_into(emitter, operand, array, elem)
        arrays.append(array)
    packed = emitter.packed_array(k, n, c_elem)
    at = emitter.fresh("batch")
    with emitter.braces(f"for (int {at} = 0; {at} < {batch}; ++{at})"):
        right = f"{arrays[1]} + {at} * {k * n}, {n}, 1, {packed}"
        emitter.write(f"pack_b<{c_elem}, {k}, {n}, {sign}>({right});")
        left = f"{arrays[0]} + {at} * {m * k}, {k}"
        emitter.write(f"dot<{m}, {n}, {k}, {sign}>({left}, {packed}, {name} + {at} * {m * n});")
    finish(emitter, op, name, c_sum)
