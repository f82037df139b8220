"""Right operands of int8 products that lie as the micro-kernel reads them: nothing is interleaved.

Such a matrix [K, N] is made of fours: row g of a matrix [K / 4, 4 N] of bytes has, of each column,
the elements 4 g to 4 g + 3 side by side. In Triton that is

    tl.reshape(tl.permute(tl.reshape(bytes, (K // 4, N, 4)), (0, 2, 1)), (K, N))
"""

from __future__ import annotations

from bitnet_triton.triton_cpu.analyse import may_write
from bitnet_triton.triton_cpu.emit.bytes import byte_expression, in_bytes, prepare
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.views import View
from bitnet_triton.triton_cpu.ir import Op, Value

_COLUMNS = 16  # of 64 bytes


def quads(emitter: Emitter, value: Value) -> Value | None:
    """Return the bytes [K / 4, 4 N] that a matrix of an int8 product is made of; None if it isn't.

    What has been written to an array stands for itself.
    """
    bytes_ = _source(value)
    if bytes_ is None or value in emitter.held or not in_bytes(emitter, bytes_, 1):
        return None
    return bytes_ if _is_for_products(value) else None


def stays_in_quads(emitter: Emitter, op: Op) -> bool:
    """Tell whether a reshape is part of such a matrix, which the products will read themselves."""
    value = op.results[0]
    if (value.type.shape or ())[-1:] == (4,) and value.type.rank == 3:
        # the inner of the two: look at the outer one
        for _ in range(2):
            if len(value.uses) != 1 or len(value.uses[0].results) != 1:
                return False
            value = value.uses[0].results[0]
    return quads(emitter, value) is not None


def _source(value: Value) -> Value | None:
    """Return what stands below the two reshapes and the permutation."""
    outer = value.op
    if outer is None or outer.name != "tt.reshape" or value.type.rank != 2:
        return None
    turned = outer.operands[0].op
    if turned is None or turned.name != "tt.trans" or turned.integers("order") != (0, 2, 1):
        return None
    inner = turned.operands[0].op
    if inner is None or inner.name != "tt.reshape":
        return None
    source = inner.operands[0]
    K, N = value.type.shape or (0, 0)
    fits = source.type.shape == (K // 4, 4 * N)
    fits = fits and turned.operands[0].type.shape == (K // 4, N, 4)
    return source if fits and K % 4 == 0 and N % _COLUMNS == 0 else None


def _is_for_products(value: Value) -> bool:
    """Tell whether only int8 products to its right read it, before memory is written to."""
    products = value.uses
    if not products or not all(_is_product(use, value) for use in products):
        return False
    op = value.op
    assert op is not None
    assert op.block is not None
    if any(use.block is not op.block for use in products):
        return False
    return not may_write(op.block.ops[op.index : max(use.index for use in products)])


def _is_product(op: Op, right: Value) -> bool:
    return (
        op.name == "tt.dot"
        and op.operands[1] is right
        and op.operands[0] is not right
        and op.operands[0].type.elem == "i8"
        and op.results[0].type.elem == "i32"
    )


def codes_of(emitter: Emitter, bytes_: Value) -> str:
    """Write the function of a row and a column that gives 64 bytes, and return its name."""
    leaves: dict[Value, View] = {}
    prepare(emitter, bytes_, 1, leaves)
    name = emitter.fresh("codes")
    code = byte_expression(emitter, bytes_, 1, leaves)
    emitter.write(f"auto const {name} = [&](int n, int64_t k) TCPU_ALWAYS {{ return {code}; }};")
    return name
