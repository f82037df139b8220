"""Reductions and scans: a scalar region combines the elements along one axis."""

from __future__ import annotations

import functools
from collections.abc import Callable

from bitnet_triton.triton_cpu.emit.arrays import materialise
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.dispatch import handles
from bitnet_triton.triton_cpu.emit.elements import array_element, element
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.masks import outermost
from bitnet_triton.triton_cpu.emit.nest import Assumption, Index, Nest, loop_pragmas
from bitnet_triton.triton_cpu.emit.order import fused_loads
from bitnet_triton.triton_cpu.emit.regions import Region, region_of
from bitnet_triton.triton_cpu.emit.split import split_loop
from bitnet_triton.triton_cpu.emit.values import Buffer, Scalar, row_major
from bitnet_triton.triton_cpu.ir import Op

# Combining operations that include/reduce.h folds in registers
_FOLDS = {
    "arith.addf": "h_add", "arith.addi": "h_add", "arith.mulf": "h_mul", "arith.muli": "h_mul",
    "arith.maxnumf": "h_maxnum", "arith.minnumf": "h_minnum", "arith.maximumf": "h_maximum",
    "arith.minimumf": "h_minimum", "arith.maxsi": "h_max", "arith.minsi": "h_min",
    "arith.maxui": "h_umax", "arith.minui": "h_umin", "arith.andi": "h_and", "arith.ori": "h_or",
    "arith.xori": "h_xor",
}  # fmt: skip
_FOLDED_TYPES = frozenset({"f32", "f64", "i32", "i64"})


@handles("tt.reduce")
def _reduce(emitter: Emitter, op: Op) -> None:
    axis = op.integer("axis")
    shape = op.operands[0].type.shape or ()
    outputs = [
        emitter.array(result.type.size, c_type(result.type), result.name) for result in op.results
    ]
    along = _reduce_rows if all(size == 1 for size in shape[axis + 1 :]) else _reduce_columns
    with region_of(emitter, op) as region:
        along(emitter, op, region, axis, outputs)
    for result, name in zip(op.results, outputs):
        block = result.is_block
        emitter.held[result] = Buffer(name, emitter.block) if block else Scalar(f"{name}[0]")


def _reduce_columns(
    emitter: Emitter, op: Op, region: Region, axis: int, outputs: list[str]
) -> None:
    """Combine slice after slice into the result: the inner loop runs along memory."""
    shape = op.operands[0].type.shape or ()
    kept = shape[:axis] + shape[axis + 1 :]
    step = emitter.fresh("j")

    def body(at: str) -> Callable[[Nest, Index], None]:
        def write(nest: Nest, index: Index) -> None:
            full = (*index[:axis], at, *index[axis:])
            values = [element(emitter, operand, full, nest) for operand in op.operands]
            place = row_major(kept, index)
            if at != "0":
                olds = _read_back(op, outputs, place, nest)
                values = region.compute(olds + values, nest)
            for name, value in zip(outputs, values):
                nest.statement(f"{name}[{place}] = {value};")

        return write

    write_loops(emitter, kept, body("0"))
    with emitter.braces(f"for (int {step} = 1; {step} < {shape[axis]}; ++{step})"):
        write_loops(emitter, kept, body(step), independent=region.independent)


def _read_back(op: Op, arrays: list[str], place: str, nest: Nest) -> list[str]:
    """Bind the current contents of accumulators, in the innermost loop."""
    depends = [name for name, level in nest.depth_of.items() if level == len(nest.levels) - 1][:1]
    return [
        nest.bind(c_type(operand.type), array_element(operand, name, place), *depends)
        for operand, name in zip(op.operands, arrays)
    ]


def _fold_name(op: Op) -> str | None:
    """Return the register fold for a reduction by one commutative operation."""
    block = op.regions[0][0]
    if len(op.operands) != 1 or len(block.ops) != 2:
        return None
    if op.operands[0].type.elem not in _FOLDED_TYPES or set(block.ops[0].operands) != set(
        block.args
    ):
        return None
    return _FOLDS.get(block.ops[0].name)


def _reduce_rows(emitter: Emitter, op: Op, region: Region, axis: int, outputs: list[str]) -> None:
    """Combine along the contiguous axis: lanes side by side first, then among each other."""
    shape = op.operands[0].type.shape or ()
    n = shape[axis]
    fold = _fold_name(op)
    lanes = min(n, 64 if fold and n >= 256 else 16)
    kept = shape[:axis] + shape[axis + 1 :]
    elems = [c_type(operand.type) for operand in op.operands]

    def body(nest: Nest, index: Index) -> None:
        rows = _masked_rows(emitter, op, nest, index, axis)
        accumulators = [emitter.fresh("lanes") for _ in elems]
        for elem, name in zip(elems, accumulators):
            nest.statement(f"alignas(64) {elem} {name}[{lanes}];")

        def step(start: str) -> str:
            return _lane_loop(
                emitter, op, region, nest, index, axis, accumulators, lanes, start, rows
            )

        nest.statement(step("0"))
        if n > lanes:
            at = emitter.fresh("j")
            head = f"for (int {at} = {lanes}; {at} < {n}; {at} += {lanes})"
            nest.statement(f"{head} {{ {step(at)} }}")
        _fold(emitter, op, region, nest, accumulators, lanes, fold)
        place = row_major(kept, index)
        for output, name in zip(outputs, accumulators):
            last = f"hreduce<{fold}, {lanes}>({name})" if fold else f"{name}[0]"
            nest.statement(f"{output}[{place}] = {last};")

    write_loops(emitter, kept, body, independent=False)


def _masked_rows(emitter: Emitter, op: Op, nest: Nest, index: Index, axis: int) -> list[str] | None:
    """Write masked elements of one row to arrays first; None where nothing is masked.

    GCC 12 vectorises a masked load in a plain loop, but not in one that combines lanes.
    """
    if not any(fused_loads(emitter, operand) for operand in op.operands):
        return None
    n = (op.operands[0].type.shape or ())[axis]
    rows = [emitter.fresh("row") for _ in op.operands]

    at = emitter.fresh("i")

    def fill(first: str, end: str, assumed: Assumption) -> tuple[Nest, str]:
        inner = Nest(emitter, 1, assumed)
        inner.depth_of[at] = 1
        full = (*index[:axis], at, *index[axis:])
        values = [element(emitter, operand, full, inner) for operand in op.operands]
        stores = [f"{name}[{at}] = {value};" for name, value in zip(rows, values)]
        return inner, _inner_loop(inner, at, n, stores, first, end)

    inner, code = fill("0", str(n), nest.assumed)
    nest.meet_masks(inner.masks)
    if not inner.masks:
        return None
    for operand, name in zip(op.operands, rows):
        nest.statement(f"alignas(64) {c_type(operand.type)} {name}[{n}];")
    masks = outermost(emitter, inner.masks)
    met_at = {mask: inner.masks[mask] for mask in masks}
    split = split_loop(emitter, met_at, at, n) if masks else None
    if split is not None:
        parts = " ".join(fill(*part)[1] for part in split.parts())
        code = parts if split.is_certain else f"if ({split.condition}) {{ {parts} }} else {code}"
    nest.statement(code)
    return rows


def _inner_loop(
    inner: Nest, at: str, n: int, stores: list[str], first: str = "0", end: str = "",
    *, independent: bool = True,
) -> str:  # fmt: skip
    loop = f"for (int {at} = {first}; {at} < {end or n}; ++{at}) "
    body = " ".join(inner.levels[1] + stores)
    pragmas = "\n".join(loop_pragmas(n, independent=independent))
    return f"{{ {' '.join(inner.levels[0])}\n{pragmas}\n{loop}{{ {body} }} }}"


def _lane_loop(
    emitter: Emitter, op: Op, region: Region, nest: Nest, index: Index, axis: int,
    accumulators: list[str], lanes: int, start: str, rows: list[str] | None,
) -> str:  # fmt: skip
    """Return the code that combines ``lanes`` elements from ``start`` on into the accumulators."""
    lane = emitter.fresh("l")
    inner = Nest(emitter, 1, nest.assumed)
    inner.depth_of[lane] = 1
    at = lane if start == "0" else f"({start} + {lane})"
    if rows is None:
        full = (*index[:axis], at, *index[axis:])
        values = [element(emitter, operand, full, inner) for operand in op.operands]
    else:
        values = _read_back(op, rows, at, inner)
    if start != "0":
        olds = _read_back(op, accumulators, lane, inner)
        values = region.compute(olds + values, inner)
    stores = [f"{name}[{lane}] = {value};" for name, value in zip(accumulators, values)]
    nest.meet_masks(inner.masks)
    return _inner_loop(inner, lane, lanes, stores, independent=region.independent)


def _fold(
    emitter: Emitter, op: Op, region: Region, nest: Nest, accumulators: list[str], lanes: int,
    fold: str | None,
) -> None:  # fmt: skip
    """Combine the upper half of the lanes into the lower, until one is left."""
    half = 0 if fold else lanes // 2
    while half:
        lane = emitter.fresh("l")
        inner = Nest(emitter, 1)
        inner.depth_of[lane] = 1
        low = _read_back(op, accumulators, lane, inner)
        high = _read_back(op, accumulators, f"{lane} + {half}", inner)
        values = region.compute(low + high, inner)
        stores = [f"{name}[{lane}] = {value};" for name, value in zip(accumulators, values)]
        body = " ".join(inner.levels[1] + stores)
        nest.statement("\n".join(["", *loop_pragmas(half, independent=False)]))
        nest.statement(f"for (int {lane} = 0; {lane} < {half}; ++{lane}) {{ {body} }}")
        half //= 2


@handles("tt.scan")
def _scan(emitter: Emitter, op: Op) -> None:
    axis, reverse = op.integer("axis"), op.flag("reverse")
    shape = op.operands[0].type.shape or ()
    sources = [materialise(emitter, operand).name for operand in op.operands]
    outputs = [emitter.array(r.type.size, c_type(r.type), r.name) for r in op.results]
    kept = shape[:axis] + shape[axis + 1 :]
    first = shape[axis] - 1 if reverse else 0

    def copy(nest: Nest, index: Index) -> None:
        place = row_major(shape, (*index[:axis], str(first), *index[axis:]))
        for source, output in zip(sources, outputs):
            nest.statement(f"{output}[{place}] = {source}[{place}];")

    at = emitter.fresh("j")

    def step(region: Region, nest: Nest, index: Index) -> None:
        here = row_major(shape, (*index[:axis], at, *index[axis:]))
        before = f"{at} {'+' if reverse else '-'} 1"
        there = row_major(shape, (*index[:axis], f"({before})", *index[axis:]))
        olds = _read_back(op, outputs, there, nest)
        news = _read_back(op, sources, here, nest)
        values = region.compute(olds + news, nest)
        for output, value in zip(outputs, values):
            nest.statement(f"{output}[{here}] = {value};")

    write_loops(emitter, kept, copy)
    order = (f"{at} = {shape[axis] - 2}; {at} >= 0; --{at}" if reverse
             else f"{at} = 1; {at} < {shape[axis]}; ++{at}")  # fmt: skip
    with region_of(emitter, op) as region, emitter.braces(f"for (int {order})"):
        combine = functools.partial(step, region)
        write_loops(emitter, kept, combine, independent=region.independent)
    for result, name in zip(op.results, outputs):
        emitter.held[result] = Buffer(name, emitter.block)


@handles("tt.map_elementwise")
def _map_elementwise(emitter: Emitter, op: Op) -> None:
    """Call a scalar function on elements, or on ``pack`` neighbours of the last dimension."""
    pack = op.integer("pack", 1)
    outputs = [emitter.array(r.type.size, c_type(r.type), r.name) for r in op.results]
    shape = op.results[0].type.shape or ()
    if shape[-1] % pack:
        raise op.unsupported(f"the last dimension, {shape[-1]}, is no multiple of pack={pack}")

    def body(region: Region, nest: Nest, index: Index) -> None:
        places = [(*index[:-1], f"({index[-1]} * {pack} + {j})") for j in range(pack)]
        inputs = [element(emitter, v, place, nest) for v in op.operands for place in places]
        values = iter(region.compute(inputs, nest))
        for output in outputs:
            for place in places:
                nest.statement(f"{output}[{row_major(shape, place)}] = {next(values)};")

    sizes = (*shape[:-1], shape[-1] // pack)
    with region_of(emitter, op) as region:
        mapped = functools.partial(body, region)
        write_loops(emitter, sizes, mapped, independent=region.independent)
    for result, name in zip(op.results, outputs):
        emitter.held[result] = Buffer(name, emitter.block)
