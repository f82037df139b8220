"""Elements of block values: expressions in an index, inlined wherever they are read."""

from __future__ import annotations

from collections.abc import Callable

from bitnet_triton.triton_cpu.emit import scalar
from bitnet_triton.triton_cpu.emit.ctypes import c_type, literal
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.values import Buffer, Lazy, row_major
from bitnet_triton.triton_cpu.ir import Op, UnsupportedOperation, Value

Element = Callable[[Emitter, Op, Value, Index, Nest], str]


def element(emitter: Emitter, value: Value, index: Index, nest: Nest) -> str:
    """Return the expression of one element; what it needs is written into ``nest``."""
    shape = value.type.shape
    if shape is None:
        return emitter.scalar(value)
    index = tuple("0" if size == 1 else i for size, i in zip(shape, index))
    key = (value, index)
    if key not in nest.elements:
        nest.elements[key] = _element(emitter, value, index, nest)
    return nest.elements[key]


def _element(emitter: Emitter, value: Value, index: Index, nest: Nest) -> str:
    held = emitter.held.get(value)
    if isinstance(held, Buffer):
        place = row_major(value.type.shape or (), index)
        return nest.bind(c_type(value.type), array_element(value, held.name, place))
    if isinstance(held, Lazy):
        return held.element(index, nest)
    if value.type.elem == "i1" and not value.type.pointer:
        known = nest.assumed.known(value)
        if known is not None:
            return known
        nest.meet_masks({value: {index}})
    op = value.op
    if op is None:
        raise UnsupportedOperation(f"the block argument `{value.name}` has no value")
    if op.name in ELEMENTS:
        return ELEMENTS[op.name](emitter, op, value, index, nest)
    operands = [element(emitter, operand, index, nest) for operand in op.operands]
    return _compute(emitter, op, operands, nest)


def _compute(emitter: Emitter, op: Op, operands: list[str], nest: Nest) -> str:
    simple = scalar.simplified(op, operands)
    if simple is not None:
        return simple
    result = op.results[0]
    code = scalar.expression(op, operands, wraps=not emitter.is_address(result))
    return nest.bind(c_type(result.type), code)


def element_now(emitter: Emitter, value: Value, index: Index) -> str:
    """Compute one element at a constant index, at the current place in the program."""
    nest = Nest(emitter, 0)
    code = element(emitter, value, index, nest)
    for line in nest.levels[0]:
        emitter.write(line)
    return code


def _constant(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    return literal(op.attributes["value"], value.type)


def _splat(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    return emitter.scalar(op.operands[0])


def _range(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    start = op.integer("start")
    return nest.bind("int32_t", f"int32_t({index[0]}{f' + {start}' if start else ''})")


def _expand(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    axis = op.integer("axis")
    return element(emitter, op.operands[0], index[:axis] + index[axis + 1 :], nest)


def _broadcast(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    return element(emitter, op.operands[0], index, nest)


def _transpose(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    source = ["0"] * len(index)
    for place, origin in zip(index, op.integers("order")):
        source[origin] = place
    return element(emitter, op.operands[0], tuple(source), nest)


def _load(emitter: Emitter, op: Op, value: Value, index: Index, nest: Nest) -> str:
    address = element(emitter, op.operands[0], index, nest)
    c_elem = c_type(value.type)
    read = load_expression(address, op)
    if len(op.operands) == 1:
        return nest.bind(c_elem, read, hint=value.name)
    mask = element(emitter, op.operands[1], index, nest)
    if mask == "true":
        return nest.bind(c_elem, read, hint=value.name)
    other = f"{c_elem}(0)"
    if len(op.operands) > 2:
        other = element(emitter, op.operands[2], index, nest)
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
