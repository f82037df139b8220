"""Elements of operations that say where data stands: inlined wherever they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitnet_triton.triton_cpu.emit.ctypes import c_type, literal
from bitnet_triton.triton_cpu.emit.nest import Nest
from bitnet_triton.triton_cpu.emit.values import Index
from bitnet_triton.triton_cpu.ir import Op, Value

if TYPE_CHECKING:
    from bitnet_triton.triton_cpu.emit.emitter import Emitter

Element = Callable[["Emitter", Op, Value, Index, Nest], str]


def _constant(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    return literal(op.attributes["value"], value.type)


def _splat(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    return emitter.scalar(op.operands[0])


def _range(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    start = op.integer("start")
    return nest.bind("int32_t", f"int32_t({index[0]}{f' + {start}' if start else ''})")


def _expand(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    axis = op.integer("axis")
    return emitter.element(op.operands[0], index[:axis] + index[axis + 1 :], nest)


def _broadcast(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    return emitter.element(op.operands[0], index, nest)


def _transpose(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    source = ["0"] * len(index)
    for place, origin in zip(index, op.integers("order")):
        source[origin] = place
    return emitter.element(op.operands[0], tuple(source), nest)


def _load(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    address = emitter.element(op.operands[0], index, nest)
    c_elem = c_type(value.type)
    read = load_expression(address, op)
    if len(op.operands) == 1:
        return nest.bind(c_elem, read, hint=value.name)
    mask = emitter.element(op.operands[1], index, nest)
    if mask == "true":
        return nest.bind(c_elem, read, hint=value.name)
    other = f"{c_elem}(0)"
    if len(op.operands) > 2:
        other = emitter.element(op.operands[2], index, nest)
    if mask == "false":
        return nest.bind(c_elem, other, hint=value.name)
    return nest.bind(c_elem, f"{mask} ? {read} : {other}", hint=value.name)


def load_expression(address: str, load: Op) -> str:
    """Return the C++ expression of what ``load`` reads at ``address``."""
    type_ = load.results[0].type
    c_elem = "uint8_t" if type_.elem == "i1" else c_type(type_)
    code = f"*(const {c_elem}*)({address})"
    if load.flag("isVolatile"):  # a loop that waits for another program reads every time
        code = f"a_load(({c_elem}*)({address}))"
    return f"({code} != 0)" if type_.elem == "i1" else code


def array_element(value: Value, name: str, place: str) -> str:
    """Return the C++ expression of an element of the array that holds ``value``."""
    # GCC does not vectorise a loop that loads a bool
    is_bool = value.type.elem == "i1" and not value.type.pointer
    return f"((const uint8_t*){name})[{place}] != 0" if is_bool else f"{name}[{place}]"


ELEMENTS: dict[str, Element] = {
    "arith.constant": _constant,
    "tt.splat": _splat,
    "tt.make_range": _range,
    "tt.expand_dims": _expand,
    "tt.broadcast": _broadcast,
    "tt.trans": _transpose,
    "tt.load": _load,
}
