"""Scalar regions: what combines two elements, or maps one, as an expression or as a function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bitnet_triton.triton_cpu.emit import scalar
from bitnet_triton.triton_cpu.emit.arrays import materialise, settle
from bitnet_triton.triton_cpu.emit.ctypes import c_type, literal
from bitnet_triton.triton_cpu.emit.dispatch import TERMINATORS, run_block
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.nest import Nest
from bitnet_triton.triton_cpu.emit.order import fused_loads
from bitnet_triton.triton_cpu.emit.values import Scalar
from bitnet_triton.triton_cpu.ir import Block, Op, Value

# Beside arithmetic: what has a value and does nothing else
_PURE = TERMINATORS | {
    "tt.addptr", "tt.bitcast", "tt.clampf", "tt.extern_elementwise", "tt.fp_to_fp",
    "tt.int_to_ptr", "tt.mulhiui", "tt.precise_divf", "tt.precise_sqrt", "tt.ptr_to_int",
    "ub.poison",
}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """A region that nests can compute.

    Attributes:
        compute: returns the expressions of what it yields for those of its arguments.
        independent: it may be computed for several elements at once.
    """

    compute: Callable[[list[str], Nest], list[str]]
    independent: bool


@contextlib.contextmanager
def region_of(emitter: Emitter, op: Op) -> Iterator[Region]:
    """Prepare the region of ``op`` for the nests that are written inside the with block."""
    block = op.regions[0][0]
    if _is_expression(block):
        yield Region(functools.partial(_expressions, emitter, block), independent=True)
        return
    settle(emitter, op)
    for operand in op.operands:
        if fused_loads(emitter, operand):
            materialise(emitter, operand)
    stopped = emitter.fresh("stopped")
    emitter.write(f"bool {stopped} = false;")
    function, struct = _write_function(emitter, block, stopped)
    yield Region(functools.partial(_call, function, struct, op), independent=False)
    emitter.write(f"if ({stopped}) return;")


def _is_expression(block: Block) -> bool:
    """Tell whether a region only has values: nothing is read, written, repeated or asserted."""
    return all(
        op.name in _PURE
        or op.name.startswith(("arith.", "math."))
        or (op.name == "scf.if" and all(_is_expression(r[0]) for r in op.regions if r))
        for op in block.ops
    )


def _expressions(emitter: Emitter, block: Block, inputs: list[str], nest: Nest) -> list[str]:
    return _inline(emitter, block, dict(zip(block.args, inputs)), nest, inputs)


def _inline(
    emitter: Emitter, block: Block, known: dict[Value, str], nest: Nest, inputs: list[str]
) -> list[str]:
    def read(value: Value) -> str:
        return known[value] if value in known else emitter.scalar(value)

    for op in block.ops:
        if op.name in TERMINATORS:
            return [read(value) for value in op.operands]
        if op.name == "scf.if":
            _inline_branches(emitter, op, known, nest, inputs)
            continue
        result = op.results[0]
        if op.name == "arith.constant":
            known[result] = literal(op.attributes["value"], result.type)
        elif op.name == "ub.poison":
            known[result] = f"({c_type(result.type)})0"
        else:
            code = scalar.expression(op, [read(value) for value in op.operands], wraps=True)
            known[result] = nest.bind(c_type(result.type), code, *inputs)
    raise AssertionError("a region without an end")


def _inline_branches(
    emitter: Emitter, op: Op, known: dict[Value, str], nest: Nest, inputs: list[str]
) -> None:
    """Compute both branches of an if, which have no side effects, and choose."""
    condition = known.get(op.operands[0]) or emitter.scalar(op.operands[0])
    branches = [
        _inline(emitter, region[0], dict(known), nest, inputs) for region in op.regions if region
    ]
    for place, result in enumerate(op.results):
        code = f"{condition} ? {branches[0][place]} : {branches[1][place]}"
        known[result] = nest.bind(c_type(result.type), code, *inputs)


def _write_function(emitter: Emitter, block: Block, stopped: str) -> tuple[str, str]:
    """Write a region as a C++ function; return its name and that of the struct of its results."""
    function, struct = emitter.fresh("region"), emitter.fresh("results")
    yielded = [c_type(value.type) for value in block.ops[-1].operands]
    fields = " ".join(f"{elem} {_field(place)};" for place, elem in enumerate(yielded))
    emitter.write(f"struct {struct} {{ {fields} }};")
    parameters = []
    for argument in block.args:
        name = emitter.fresh(argument.name)
        parameters.append(f"{c_type(argument.type)} const {name}")
        emitter.held[argument] = Scalar(name)
    head = f"auto const {function} = [&]({', '.join(parameters)}) -> {struct}"
    with emitter.braces(head, "};"), emitter.scope(block):
        with emitter.leaving(f"{{ {stopped} = true; return {{}}; }}"):
            end = run_block(emitter, block)
        results = ", ".join(emitter.scalar(value) for value in end.operands)
        emitter.write(f"return {{{results}}};")
    return function, struct


def _call(function: str, struct: str, op: Op, inputs: list[str], nest: Nest) -> list[str]:
    innermost = [name for name, level in nest.depth_of.items() if level == len(nest.levels) - 1][:1]
    results = nest.bind(struct, f"{function}({', '.join(inputs)})", *innermost, hint="results")
    return [f"{results}.{_field(place)}" for place in range(len(op.regions[0][0].ops[-1].operands))]


def _field(place: int) -> str:
    return f"result{place}"
