"""Arithmetic on 64 bytes at a time: unpacking codes without widening them."""

from __future__ import annotations

import operator
from collections.abc import Callable

from bitnet_triton.triton_cpu.analyse import splat_integer
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.views import (
    View,
    address_step,
    is_memory,
    matrix_view,
    rows_view,
)
from bitnet_triton.triton_cpu.ir import Value

BYTES = 64
_BYTE_OPERATIONS = {
    "arith.andi": "&", "arith.ori": "|", "arith.xori": "^", "arith.addi": "+", "arith.subi": "-",
}  # fmt: skip
_ON_INTEGERS: dict[str, Callable[[int, int], int]] = {
    "arith.andi": operator.and_, "arith.ori": operator.or_, "arith.xori": operator.xor,
    "arith.addi": operator.add, "arith.subi": operator.sub,
    "arith.shrui": operator.rshift, "arith.shli": operator.lshift,
}  # fmt: skip


def in_bytes(emitter: Emitter, value: Value, along: int) -> bool:
    """Tell whether 64 neighbours of an int8 value can be computed at once, as bytes."""
    if value.type.elem != "i8" or value.type.pointer:
        return False
    if splat_integer(value) is not None:
        return True
    if emitter.buffer(value) is not None:
        return along == value.type.rank - 1
    op = value.op
    if op is None or value in emitter.held:
        return False
    if op.name == "tt.load":
        return is_memory(emitter, value) and address_step(emitter, value, along) == 1
    if op.name == "tt.trans":
        return in_bytes(emitter, op.operands[0], op.integers("order")[along])
    if op.name in ("arith.shrui", "arith.shli"):
        shift = splat_integer(op.operands[1])
        return shift is not None and 0 <= shift < 8 and in_bytes(emitter, op.operands[0], along)
    return op.name in _BYTE_OPERATIONS and all(in_bytes(emitter, v, along) for v in op.operands)


def of_zeros(value: Value) -> int | None:
    """Return the byte that an expression has where all that is loaded is 0; None if unknown."""
    constant = splat_integer(value)
    op = value.op
    if constant is not None or op is None or op.name == "tt.load":
        return constant if constant is not None or op is None else 0
    parts = [of_zeros(operand) for operand in op.operands]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    if op.name == "tt.trans":
        return known[0]
    compute = _ON_INTEGERS.get(op.name)
    return None if compute is None else compute(known[0] & 255, known[1]) & 255


def loads_below(emitter: Emitter, value: Value) -> set[Value]:
    """Return what ``prepare`` would look for."""
    if splat_integer(value) is not None:
        return set()
    if emitter.buffer(value) is not None or value.op is None or value.op.name == "tt.load":
        return {value}
    return set().union(*(loads_below(emitter, operand) for operand in value.op.operands))


def prepare(
    emitter: Emitter,
    value: Value,
    along: int,
    leaves: dict[Value, View],
    upto: str | None = None,
    rows: list[str] | None = None,
) -> None:
    """Find out where the loads below a byte expression read.

    Args:
        emitter: writes the code for it.
        value: the expression.
        along: the dimension of 64 neighbours.
        leaves: gets what is found.
        upto: as in ``matrix_view``.
        rows: gets numbers of rows, the others of which need not be read; None: all are.
    """
    op = value.op
    if value in leaves or splat_integer(value) is not None:
        return
    if emitter.buffer(value) is not None or (op is not None and op.name == "tt.load"):
        if rows is None or upto is None:
            view = matrix_view(emitter, value, unit=along, upto=upto)
        else:
            view, counts = rows_view(emitter, value, along, upto)
            rows += counts
        leaves[value] = View(view.base, (view.steps[1 - along], view.steps[along]))
        return
    assert op is not None
    if op.name == "tt.trans":
        prepare(emitter, op.operands[0], op.integers("order")[along], leaves, upto, rows)
        return
    for operand in op.operands:
        prepare(emitter, operand, along, leaves, upto, rows)


def byte_expression(emitter: Emitter, value: Value, along: int, leaves: dict[Value, View]) -> str:
    """Return the expression of 64 bytes of row ``n`` from column ``k`` on."""
    constant = splat_integer(value)
    if constant is not None:
        return f"splat64({constant})"
    if value in leaves:
        view = leaves[value]
        return f"load64({view.base} + n * int64_t({view.steps[0]}) + k)"
    op = value.op
    assert op is not None
    if op.name == "tt.trans":
        return byte_expression(emitter, op.operands[0], op.integers("order")[along], leaves)
    first = byte_expression(emitter, op.operands[0], along, leaves)
    if op.name in ("arith.shrui", "arith.shli"):
        function = "shr64" if op.name == "arith.shrui" else "shl64"
        return f"{function}({first}, {splat_integer(op.operands[1])})"
    second = byte_expression(emitter, op.operands[1], along, leaves)
    return f"({first} {_BYTE_OPERATIONS[op.name]} {second})"


def fill_bytes(emitter: Emitter, value: Value) -> View | None:
    """Write an int8 matrix, row by row, to an array; None if it is not computed in bytes."""
    rows, columns = value.type.shape or (0, 0)
    if value.type.elem != "i8" or columns % BYTES or not in_bytes(emitter, value, 1):
        return None
    leaves: dict[Value, View] = {}
    prepare(emitter, value, 1, leaves)
    array = emitter.array(value.type.size, "int8_t", "bytes")
    with (
        emitter.braces(f"for (int n = 0; n < {rows}; ++n)"),
        emitter.braces(f"for (int k = 0; k < {columns}; k += {BYTES})"),
    ):
        code = byte_expression(emitter, value, 1, leaves)
        emitter.write(f"store_wide({array} + n * {columns} + k, {code});")
    return View(array, (str(columns), "1"))
