"""Operands of products: read where they lie in memory when possible, copied when they must be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bitnet_triton.triton_cpu.analyse import is_zero, splat_integer
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.elements import element, element_now
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.masks import holds_everywhere, prefix, prefixes
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.strides import contiguous_along, linear, stride
from bitnet_triton.triton_cpu.emit.values import row_major
from bitnet_triton.triton_cpu.ir import Value


@dataclass(frozen=True)
class View:
    """A matrix in memory: the address of its first element, and the steps in elements."""

    base: str
    steps: tuple[str, str]


def matrix_view(
    emitter: Emitter,
    value: Value,
    *,
    unit: int | None = None,
    c_elem: str | None = None,
    upto: str | None = None,
) -> View:
    """Return where the elements of a matrix lie.

    Args:
        emitter: writes the code for it.
        value: [rows, columns].
        unit: the dimension along which neighbours must lie side by side; None for either.
        c_elem: the C++ type wanted, if it is not the value's own.
        upto: how many elements along ``unit`` will be read; None for all.
    """
    root, order = untransposed(emitter, value)
    if c_elem in (None, c_type(value.type)):
        buffer = emitter.buffer(root)
        if buffer is not None:
            steps = _row_major_steps(root)
            view = View(buffer.name, (str(steps[order[0]]), str(steps[order[1]])))
            if unit is None or view.steps[unit] == "1" or (value.type.shape or ())[unit] == 1:
                return view
        elif is_memory(emitter, root) and (
            unit is None or address_step(emitter, root, order[unit]) == 1
        ):
            return _loaded_view(emitter, value, root, order, unit, upto)
    return _copy(emitter, value, unit, c_elem)


def untransposed(emitter: Emitter, value: Value) -> tuple[Value, tuple[int, ...]]:
    """Return the value under a transposition, and which of its dimensions ours are.

    What has been written to an array stands for itself: memory below may have changed since.
    """
    is_view = value.op is not None and value.op.name == "tt.trans" and value.type.rank == 2
    if is_view and value not in emitter.held:
        assert value.op is not None
        root, order = untransposed(emitter, value.op.operands[0])
        return root, tuple(order[d] for d in value.op.integers("order"))
    return value, tuple(range(value.type.rank))


def _row_major_steps(value: Value) -> tuple[int, ...]:
    shape = value.type.shape or ()
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def is_memory(emitter: Emitter, value: Value) -> bool:
    """Tell whether ``value`` is a load at addresses that are linear in the index."""
    op = value.op
    if op is None or op.name != "tt.load" or value in emitter.held or value.type.elem == "i1":
        return False
    return all(linear(emitter, op.operands[0], dim) for dim in range(value.type.rank))


def address_step(emitter: Emitter, value: Value, dim: int) -> int | None:
    """Return the constant step of a load's addresses."""
    assert value.op is not None
    return stride(emitter, value.op.operands[0], dim)


def is_listed(emitter: Emitter, value: Value, unit: int) -> bool:
    """Tell whether ``value`` loads rows along ``unit`` from anywhere, each whole or not at all."""
    op = value.op
    if op is None or op.name != "tt.load" or value in emitter.held or value.type.elem == "i1":
        return False
    address, *masked = op.operands
    if op.flag("isVolatile") or stride(emitter, address, unit) != 1:
        return False
    is_zero_beside = len(masked) < 2 or is_zero(masked[1])
    return not masked or (is_zero_beside and stride(emitter, masked[0], unit) == 0)


def listed_rows(emitter: Emitter, value: Value, unit: int) -> str:
    """Return an array of where the rows of a load lie; those that are masked off are zeros."""
    assert value.op is not None
    address, *masked = value.op.operands
    shape, c_elem = value.type.shape or (), c_type(value.type)
    array = emitter.array(shape[1 - unit], f"const {c_elem}*", "rows")

    def body(nest: Nest, index: Index) -> None:
        (row,) = index
        first = (row, "0") if unit else ("0", row)
        at = f"(const {c_elem}*)({element(emitter, address, first, nest)})"
        mask = element(emitter, masked[0], first, nest) if masked else "true"
        zeros = f"zero_row<{c_elem}, {shape[unit]}>"
        code = {"true": at, "false": zeros}.get(mask, f"{mask} ? {at} : {zeros}")
        nest.statement(f"{array}[{row}] = {code};")

    write_loops(emitter, (shape[1 - unit],), body)
    return array


def _copy(emitter: Emitter, value: Value, unit: int | None, c_elem: str | None) -> View:
    array = emitter.array(value.type.size, c_elem or c_type(value.type), "copy")
    return fill_array(emitter, value, array, unit, c_elem)


def fill_array(
    emitter: Emitter, value: Value, array: str, unit: int | None, c_elem: str | None = None
) -> View:
    """Copy a matrix to an array; neighbours along ``unit`` come to lie side by side."""
    rows, columns = value.type.shape or ()
    from_columns = contiguous_along(emitter, value, 0)
    to_columns = from_columns if unit is None else unit == 0

    def body(nest: Nest, index: Index) -> None:
        i, j = index
        place = (
            row_major((columns, rows), (j, i)) if to_columns else row_major((rows, columns), index)
        )
        code = element(emitter, value, index, nest)
        nest.statement(f"{array}[{place}] = {f'{c_elem}({code})' if c_elem else code};")

    write_loops(emitter, (rows, columns), body, (1, 0) if from_columns else None)
    return View(array, ("1", str(rows)) if to_columns else (str(columns), "1"))


def _loaded_view(
    emitter: Emitter,
    value: Value,
    root: Value,
    order: tuple[int, ...],
    unit: int | None,
    upto: str | None,
) -> View:
    condition = _condition(emitter, root, None if unit is None else order[unit], upto)
    if condition is None:
        return _copy(emitter, value, unit, None)
    if condition == "true":
        return _address_view(emitter, root, order)
    names = _declare(emitter, value)
    array = emitter.array(value.type.size, c_type(value.type), "copy")
    with emitter.braces(f"if ({condition})"):
        _assign(emitter, names, _address_view(emitter, root, order))
    with emitter.braces("else"):
        _assign(emitter, names, fill_array(emitter, value, array, unit))
    return View(names[0], (names[1], names[2]))


def _condition(emitter: Emitter, root: Value, dim: int | None, upto: str | None) -> str | None:
    """Return when a load may be read from memory as it stands; None if that is not known."""
    assert root.op is not None
    if len(root.op.operands) == 1:
        return "true"
    mask = root.op.operands[1]
    if upto is None:
        return holds_everywhere(emitter, mask)
    parts = prefix(emitter, mask, dim)
    if parts is None:
        return None
    return " && ".join([*parts[0], *(f"({n} >= {upto})" for n in parts[1])]) or "true"


@dataclass(frozen=True)
class Corner:
    """The part of a matrix that is not masked off, from its first element on; zeros surround it.

    Attributes:
        view: where it lies.
        length: C++ expression of its size along the unit dimension.
        count: of its size along the other one.
    """

    view: View
    length: str
    count: str


def corner(emitter: Emitter, value: Value, unit: int, multiple: int) -> Corner:
    """Return where a matrix lies, and how much of it is not masked off.

    The others are zeros that a sum need not read. ``length`` is a multiple of ``multiple``, which
    the size along ``unit`` is as well.
    """
    shape = value.type.shape or ()
    size, other = shape[unit], shape[1 - unit]
    root, order = untransposed(emitter, value)
    parts = None
    if is_memory(emitter, root) and address_step(emitter, root, order[unit]) == 1:
        parts = _zero_beyond(emitter, root, (order[unit], order[1 - unit]))
    if parts is None or not any(parts[1]):
        return Corner(matrix_view(emitter, value, unit=unit), str(size), str(other))
    names, length, count = _declare(emitter, value), emitter.fresh("length"), emitter.fresh("count")
    array = emitter.array(value.type.size, c_type(value.type), "copy")
    conditions, (lengths, counts) = parts
    emitter.write(f"int64_t {length} = shortest({', '.join([str(size), *lengths])});")
    emitter.write(f"int64_t {count} = shortest({', '.join([str(other), *counts])});")
    with emitter.braces(f"if ({' && '.join([*conditions, f'{length} % {multiple} == 0'])})"):
        _assign(emitter, names, _address_view(emitter, root, order))
    with emitter.braces("else"):
        _assign(emitter, names, fill_array(emitter, value, array, unit))
        emitter.write(f"{length} = {size};")
        emitter.write(f"{count} = {other};")
    return Corner(View(names[0], (names[1], names[2])), length, count)


def rows_view(emitter: Emitter, value: Value, unit: int, upto: str) -> tuple[View, list[str]]:
    """Return where the rows of a matrix lie that are not masked off, and how many these are.

    Args:
        emitter: writes the code for it.
        value: a matrix that ``corner`` would find zeros around.
        unit: the dimension along the rows.
        upto: how many elements along ``unit`` will be read.
    """
    root, order = untransposed(emitter, value)
    parts = None
    if is_memory(emitter, root) and address_step(emitter, root, order[unit]) == 1:
        parts = _zero_beyond(emitter, root, (order[unit], order[1 - unit]))
    if parts is None or not parts[1][1]:
        return matrix_view(emitter, value, unit=unit, upto=upto), []
    conditions, (lengths, counts) = parts
    size = (value.type.shape or ())[1 - unit]
    names, count = _declare(emitter, value), emitter.fresh("count")
    array = emitter.array(value.type.size, c_type(value.type), "copy")
    emitter.write(f"int64_t {count} = {size};")
    known = [*conditions, *(f"({n} >= {upto})" for n in lengths)]
    with emitter.braces(f"if ({' && '.join(known) or 'true'})"):
        _assign(emitter, names, _address_view(emitter, root, order))
        emitter.write(f"{count} = shortest({', '.join([str(size), *counts])});")
    with emitter.braces("else"):
        _assign(emitter, names, fill_array(emitter, value, array, unit))
    return View(names[0], (names[1], names[2])), [count]


def rows_in_use(emitter: Emitter, value: Value) -> str:
    """Return how many rows of a matrix may hold anything but zeros."""
    rows = str((value.type.shape or ())[0])
    root, order = untransposed(emitter, value)
    if not is_memory(emitter, root):
        return rows
    parts = _zero_beyond(emitter, root, order)
    if parts is None or not parts[1][0]:
        return rows
    count = emitter.fresh("rows")
    conditions, numbers = parts
    smallest = f"shortest({', '.join([rows, *numbers[0]])})"
    known = " && ".join(conditions) or "true"
    emitter.write(f"int const {count} = {known} ? {smallest} : {rows};")
    return count


def _zero_beyond(
    emitter: Emitter, root: Value, dims: tuple[int, ...]
) -> tuple[list[str], list[list[str]]] | None:
    assert root.op is not None
    _, *masked = root.op.operands
    if not masked or (len(masked) > 1 and splat_integer(masked[1]) != 0):
        return None
    return prefixes(emitter, masked[0], dims)


def _declare(emitter: Emitter, value: Value) -> tuple[str, str, str]:
    """Declare a base and two steps that are set later."""
    base, first, second = (emitter.fresh(hint) for hint in ("base", "step", "step"))
    emitter.write(f"const {c_type(value.type)}* {base}; int64_t {first}, {second};")
    return base, first, second


def _assign(emitter: Emitter, names: tuple[str, str, str], view: View) -> None:
    for name, code in zip(names, (view.base, *view.steps)):
        emitter.write(f"{name} = {code};")


def _address_view(emitter: Emitter, root: Value, order: tuple[int, ...]) -> View:
    assert root.op is not None
    address = root.op.operands[0]
    origin = element_now(emitter, address, ("0", "0"))
    base, c_elem = emitter.fresh("base"), c_type(root.type)
    emitter.write(f"const {c_elem}* const {base} = (const {c_elem}*)({origin});")
    steps = []
    for dim in order:
        known = stride(emitter, address, dim)
        if known is None:
            neighbour = element_now(emitter, address, ("1", "0") if dim == 0 else ("0", "1"))
            steps.append(f"int64_t({neighbour} - {origin})")
        else:
            steps.append(str(known))
    return View(base, (steps[0], steps[1]))
