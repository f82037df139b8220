"""Loops, branches and early ends."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_triton.triton_cpu.analyse import invariant
from bitnet_triton.triton_cpu.emit.arrays import reusable, settle, store_into
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.dispatch import handles, run_block
from bitnet_triton.triton_cpu.emit.dot import pack_ahead
from bitnet_triton.triton_cpu.emit.elements import element
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.lanes import keeps_lanes, open_lanes
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.strides import linear, stride
from bitnet_triton.triton_cpu.emit.values import Buffer, Held, Lanes, Lazy, Scalar
from bitnet_triton.triton_cpu.ir import Block, Op, Value
from bitnet_triton.triton_cpu.structure import RETURN_IF


@dataclass(frozen=True)
class _Carried:
    """A loop-carried value: its name inside the loop, what is yielded for it, the result."""

    argument: Value
    initial: Value
    yielded: Value
    result: Value


@handles("scf.for")
def _for(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    lower, upper, step = (emitter.scalar(operand) for operand in op.operands[:3])
    body = op.regions[0][0]
    counter, *arguments = body.args
    carried = [
        _Carried(a, i, y, r)
        for a, i, y, r in zip(arguments, op.operands[3:], body.ops[-1].operands, op.results)
    ]
    trip = emitter.fresh("trip")
    emitter.write(f"int64_t {trip} = 0;")
    pack_ahead(emitter, op)
    # Addresses first: whether a sum can be kept in lanes depends on how its operands are read
    waiting = [item for item in carried if not _enter_lightly(emitter, item, body, trip)]
    for item in waiting:
        _enter_loop(emitter, item, body)
    name = emitter.fresh(counter.name or "k")
    wide = emitter.fresh("at")
    bounds = [f"int64_t({bound})" for bound in (lower, upper, step)]
    if op.flag("unsignedCmp"):
        bounds = [f"int64_t(uint32_t({bound}))" for bound in (lower, upper, step)]
    head = f"for (int64_t {wide} = {bounds[0]}; {wide} < {bounds[1]}; {wide} += {bounds[2]})"
    with emitter.braces(head):
        emitter.write(f"{c_type(counter.type)} const {name} = ({c_type(counter.type)}){wide};")
        emitter.held[counter] = Scalar(name)
        with emitter.scope(body):
            run_block(emitter, body)
            _carry(emitter, carried)
        emitter.write(f"++{trip};")
    for item in carried:
        _leave_loop(emitter, item)


def _enter_lightly(emitter: Emitter, item: _Carried, body: Block, trip: str) -> bool:
    """Hold a carried value without an array of its own; return whether that is possible."""
    argument = item.argument
    if not argument.is_block:
        name = emitter.fresh(argument.name)
        emitter.write(f"{c_type(argument.type)} {name} = {emitter.scalar(item.initial)};")
        emitter.held[argument] = Scalar(name)
    elif item.yielded is argument:
        buffer = emitter.buffer(item.initial)
        same = _alias(emitter, item.initial) if buffer is None else Buffer(buffer.name)
        emitter.held[argument] = same
    elif (step := _induction_step(emitter, item, body)) is not None:
        emitter.held[argument] = _induction(emitter, item, step, trip)
    else:
        return False
    return True


def _enter_loop(emitter: Emitter, item: _Carried, body: Block) -> None:
    """Hold a carried value in an array that starts as its initial value."""
    argument = item.argument
    if keeps_lanes(emitter, argument, item.yielded):
        emitter.held[argument] = open_lanes(emitter, item.initial)
        return
    name = emitter.array(argument.type.size, c_type(argument.type), argument.name)
    store_into(emitter, item.initial, name)
    emitter.held[argument] = Buffer(name, body)


def _alias(emitter: Emitter, value: Value) -> Lazy:
    """Stand for another value that does not change."""
    return Lazy(
        lambda index, nest: element(emitter, value, index, nest),
        lambda dim: stride(emitter, value, dim),
        lambda dim: linear(emitter, value, dim),
    )


def _induction_step(emitter: Emitter, item: _Carried, body: Block) -> Value | None:
    """Return what a carried address or integer grows by in every trip; None if it does not."""
    op, type_ = item.yielded.op, item.argument.type
    if op is None or op.name not in ("tt.addptr", "arith.addi"):
        return None
    if op.operands[0] is not item.argument or not invariant(op.operands[1], body):
        return None
    is_counter = type_.pointer or type_.elem in ("i32", "i64")
    return op.operands[1] if is_counter and emitter.buffer(item.initial) is None else None


def _induction(emitter: Emitter, item: _Carried, step: Value, trip: str) -> Lazy:
    """Compute a carried address as ``initial + trip * step``: no array of addresses."""
    type_ = item.argument.type
    c_elem = c_type(type_)
    factor = "int64_t" if type_.pointer else c_elem
    if emitter.is_address(item.argument) or type_.pointer:
        emitter.mark_address(item.initial)
        emitter.mark_address(step)

    def value_at(index: Index, nest: Nest) -> str:
        start = element(emitter, item.initial, index, nest)
        by = element(emitter, step, index, nest)
        if type_.pointer or emitter.is_address(item.argument):
            return nest.bind(c_elem, f"({start} + {factor}({trip}) * {by})")
        return nest.bind(c_elem, f"{c_elem}(uint64_t({start}) + uint64_t({trip}) * uint64_t({by}))")

    def constant_step(dim: int) -> int | None:
        return stride(emitter, item.initial, dim) if stride(emitter, step, dim) == 0 else None

    def is_linear(dim: int) -> bool:
        return linear(emitter, item.initial, dim) and linear(emitter, step, dim)

    return Lazy(value_at, constant_step, is_linear)


def _carry(emitter: Emitter, carried: list[_Carried]) -> None:
    """Give the carried values what the trip yielded; all are read before any is written."""
    staged: list[tuple[str, str, Value]] = []
    targets = {h.name for c in carried if isinstance(h := emitter.held[c.argument], Buffer)}
    for item in carried:
        held = emitter.held[item.argument]
        if item.yielded is item.argument or isinstance(held, (Lazy, Lanes)):
            continue
        if isinstance(held, Scalar):
            name = emitter.fresh("next")
            code = emitter.scalar(item.yielded)
            emitter.write(f"{c_type(item.yielded.type)} const {name} = {code};")
            staged.append((held.code, name, item.yielded))
            continue
        source = _yielded_array(emitter, item.yielded, held.name, targets)
        if source != held.name:
            staged.append((held.name, source, item.yielded))
    for place, source, value in staged:
        _copy(emitter, place, source, value)


def _yielded_array(emitter: Emitter, value: Value, target: str, targets: set[str]) -> str:
    """Return an array that holds the yielded value and that no other carried value overwrites."""
    buffer = emitter.buffer(value)
    if buffer is not None and (buffer.name == target or buffer.name not in targets):
        return buffer.name
    if buffer is None and reusable(emitter, value) == target:
        store_into(emitter, value, target)
        return target
    name = emitter.array(value.type.size, c_type(value.type), "next")
    store_into(emitter, value, name)
    return name


def _copy(emitter: Emitter, target: str, source: str, value: Value) -> None:
    if value.is_block:
        emitter.write(
            f"memcpy({target}, {source}, sizeof({c_type(value.type)}) * {value.type.size});"
        )
    else:
        emitter.write(f"{target} = {source};")


def _leave_loop(emitter: Emitter, item: _Carried) -> None:
    held = emitter.held[item.argument]
    if isinstance(held, Lanes):
        n = item.argument.type.size
        emitter.write(f"fold_lanes<{n}>({held.name}, {held.start});")
        held = Buffer(held.start, emitter.block)
    elif isinstance(held, Buffer):
        held = Buffer(held.name, emitter.block)
    emitter.held[item.result] = held


@handles("scf.if")
def _if(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    condition = emitter.scalar(op.operands[0])
    for result in op.results:
        declare(emitter, result)
    for head, region in zip((f"if ({condition})", "else"), op.regions):
        if not region or not region[0].ops:
            continue
        with emitter.braces(head), emitter.scope(region[0]):
            end = run_block(emitter, region[0])
            _assign(emitter, op.results, end.operands)


@handles(RETURN_IF)
def _return_if(emitter: Emitter, op: Op) -> None:
    emitter.write(f"if ({emitter.scalar(op.operands[0])}) return;")


def declare(emitter: Emitter, value: Value) -> None:
    """Give a value a place that several branches can write."""
    c_elem = c_type(value.type)
    if value.is_block:
        name = emitter.array(value.type.size, c_elem, value.name)
        emitter.held[value] = Buffer(name, emitter.block)
    else:
        name = emitter.fresh(value.name)
        emitter.write(f"{c_elem} {name}{{}};")
        emitter.held[value] = Scalar(name)


def _assign(emitter: Emitter, targets: list[Value], sources: list[Value]) -> None:
    """Write values into places that nothing else in ``sources`` reads."""
    for target, source in zip(targets, sources):
        assign(emitter, emitter.held[target], source)


def assign(emitter: Emitter, place: Held, source: Value) -> None:
    """Write a value into a place that was declared for it."""
    if source.op is not None and source.op.name == "ub.poison":
        return
    if isinstance(place, Buffer):
        store_into(emitter, source, place.name)
    elif isinstance(place, Scalar):
        emitter.write(f"{place.code} = {emitter.scalar(source)};")


@handles("scf.while")
def _while(emitter: Emitter, op: Op) -> None:
    settle(emitter, op)
    before, after = op.regions[0][0], op.regions[1][0]
    for argument, initial in zip(before.args, op.operands):
        declare(emitter, argument)
        _assign(emitter, [argument], [initial])
    for argument, result in zip(after.args, op.results):
        declare(emitter, result)
        held = emitter.held[result]
        # Nobody may overwrite it inside the loop: it is the result as well
        emitter.held[argument] = Buffer(held.name) if isinstance(held, Buffer) else held
    for argument in before.args:
        held = emitter.held[argument]
        emitter.held[argument] = Buffer(held.name) if isinstance(held, Buffer) else held
    with emitter.braces("while (true)"):
        with emitter.scope(before):
            end = run_block(emitter, before)
            _assign(emitter, op.results, end.operands[1:])
            emitter.write(f"if (!{emitter.scalar(end.operands[0])}) break;")
        with emitter.scope(after):
            end = run_block(emitter, after)
            stage(emitter, before.args, end.operands)


def stage(emitter: Emitter, targets: list[Value], sources: list[Value]) -> None:
    """Write values into places that ``sources`` may read: all are read first."""
    staged = []
    for source in sources:
        c_elem = c_type(source.type)
        if source.is_block:
            name = emitter.array(source.type.size, c_elem, "next")
            store_into(emitter, source, name)
        else:
            name = emitter.fresh("next")
            emitter.write(f"{c_elem} const {name} = {emitter.scalar(source)};")
        staged.append(name)
    for target, name, source in zip(targets, staged, sources):
        held = emitter.held[target]
        place = held.name if isinstance(held, Buffer) else emitter.scalar(target)
        _copy(emitter, place, name, source)
