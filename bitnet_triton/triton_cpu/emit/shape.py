"""Operations that rearrange a block."""

from __future__ import annotations

import math

from bitnet_triton.triton_cpu.emit.arrays import materialise, store_into
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.dispatch import handles
from bitnet_triton.triton_cpu.emit.elements import element, element_now
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.order import fused_loads
from bitnet_triton.triton_cpu.emit.quads import stays_in_quads
from bitnet_triton.triton_cpu.emit.values import Buffer, Lazy, Scalar, row_major
from bitnet_triton.triton_cpu.ir import Op, Value


@handles("tt.reshape")
def _reshape(emitter: Emitter, op: Op) -> None:
    if stays_in_quads(emitter, op):
        return
    source, result = op.operands[0], op.results[0]
    origin = _split_dims(source.type.shape or (), result.type.shape or ())
    lies_still = emitter.buffer(source) is None and not fused_loads(emitter, source)
    if origin is not None and lies_still:
        emitter.held[result] = _split_view(emitter, source, result, origin)
        return
    emitter.held[result] = Buffer(materialise(emitter, source).name)


def _split_dims(source: tuple[int, ...], result: tuple[int, ...]) -> list[list[int]] | None:
    """Return, for each source dimension, the dimensions of the result that it was split into.

    None if dimensions were merged: their elements would need divisions to be found.
    """
    groups: list[list[int]] = []
    dim = 0
    for size in source:
        group: list[int] = []
        product = 1
        while product < size:
            if dim == len(result):
                return None
            group.append(dim)
            product *= result[dim]
            dim += 1
        if product != size:
            return None
        groups.append(group)
    return groups if math.prod(result[dim:]) == 1 else None


def _split_view(emitter: Emitter, source: Value, result: Value, groups: list[list[int]]) -> Lazy:
    shape = result.type.shape or ()

    def value_at(index: Index, nest: Nest) -> str:
        places = []
        for group in groups:
            sizes = tuple(shape[d] for d in group)
            place = row_major(sizes, tuple(index[d] for d in group))
            places.append(place if place.isidentifier() or place == "0" else f"({place})")
        return element(emitter, source, tuple(places), nest)

    return Lazy(value_at)


@handles("tt.unsplat")
def _unsplat(emitter: Emitter, op: Op) -> None:
    source = op.operands[0]
    emitter.held[op.results[0]] = Scalar(element_now(emitter, source, ("0",) * source.type.rank))


@handles("tt.join")
def _join(emitter: Emitter, op: Op) -> None:
    result = op.results[0]

    def value_at(index: Index, nest: Nest) -> str:
        if index[-1] in ("0", "1"):
            return element(emitter, op.operands[int(index[-1])], index[:-1], nest)
        first, second = (element(emitter, v, index[:-1], nest) for v in op.operands)
        return nest.bind(c_type(result.type), f"{index[-1]} == 0 ? {first} : {second}")

    if all(use.name == "tt.split" for use in result.uses) and not _loads(emitter, op):
        emitter.held[result] = Lazy(value_at)
        return
    name = emitter.array(result.type.size, c_type(result.type), "joined")
    for place, operand in enumerate(op.operands):
        _copy_into(emitter, operand, result, name, str(place))
    emitter.held[result] = Buffer(name, emitter.block)


def _loads(emitter: Emitter, op: Op) -> bool:
    return any(fused_loads(emitter, operand) for operand in op.operands)


def _copy_into(emitter: Emitter, source: Value, result: Value, name: str, last: str) -> None:
    """Write ``source`` to the places of ``result`` whose last index is ``last``."""
    shape = result.type.shape or ()
    step = shape[-1]

    def body(nest: Nest, index: Index) -> None:
        code = element(emitter, source, index, nest)
        place = row_major(shape[:-1], index)
        nest.statement(f"{name}[({place}) * {step} + {last}] = {code};")

    write_loops(emitter, shape[:-1], body)


@handles("tt.split")
def _split(emitter: Emitter, op: Op) -> None:
    source = op.operands[0]
    if fused_loads(emitter, source):
        materialise(emitter, source)
    for place, result in enumerate(op.results):
        emitter.held[result] = _half(emitter, source, str(place))
        if not result.is_block:
            emitter.held[result] = Scalar(element_now(emitter, source, (str(place),)))


def _half(emitter: Emitter, source: Value, place: str) -> Lazy:
    return Lazy(lambda index, nest: element(emitter, source, (*index, place), nest))


@handles("tt.cat")
def _cat(emitter: Emitter, op: Op) -> None:
    result = op.results[0]
    name = emitter.array(result.type.size, c_type(result.type), "cat")
    start = 0
    for operand in op.operands:
        store_into(emitter, operand, f"({name} + {start})")
        start += operand.type.size
    emitter.held[result] = Buffer(name, emitter.block)


@handles("tt.gather")
def _gather(emitter: Emitter, op: Op) -> None:
    source, places, result = *op.operands, op.results[0]
    axis = op.integer("axis")
    held = materialise(emitter, source)
    name = emitter.array(result.type.size, c_type(result.type), "gathered")

    def body(nest: Nest, index: Index) -> None:
        place = element(emitter, places, index, nest)
        origin = row_major(source.type.shape or (), (*index[:axis], place, *index[axis + 1 :]))
        target = row_major(result.type.shape or (), index)
        nest.statement(f"{name}[{target}] = {held.name}[{origin}];")

    write_loops(emitter, result.type.shape or (), body)
    emitter.held[result] = Buffer(name, emitter.block)


@handles("tt.histogram")
def _histogram(emitter: Emitter, op: Op) -> None:
    source, *mask = op.operands
    result = op.results[0]
    bins = result.type.size
    name = emitter.array(bins, c_type(result.type), "histogram")
    emitter.write(f"memset({name}, 0, sizeof({c_type(result.type)}) * {bins});")

    def body(nest: Nest, index: Index) -> None:
        code = element(emitter, source, index, nest)
        wanted = f"uint64_t({code}) < {bins}"
        if mask:
            wanted += f" && {element(emitter, mask[0], index, nest)}"
        nest.statement(f"if ({wanted}) ++{name}[{code}];")

    write_loops(emitter, source.type.shape or (), body, independent=False)
    emitter.held[result] = Buffer(name, emitter.block)


@handles("ub.poison")
def _poison(emitter: Emitter, op: Op) -> None:
    result = op.results[0]
    zero = f"({c_type(result.type)})0"
    if result.is_block:
        emitter.held[result] = Lazy(lambda _index, _nest: zero)
    else:
        emitter.held[result] = Scalar(zero)


@handles("llvm.intr.assume", "ttg.barrier", "gpu.barrier")
def _nothing(emitter: Emitter, op: Op) -> None:
    """Hints tell nothing that is needed here, and a program is one thread: nothing to wait for."""
