"""Who emits an operation: the handler of its name, or nobody yet, if it is elementwise."""

from __future__ import annotations

from collections.abc import Callable

from bitnet_triton.triton_cpu.emit import scalar
from bitnet_triton.triton_cpu.emit.arrays import materialise
from bitnet_triton.triton_cpu.emit.ctypes import literal
from bitnet_triton.triton_cpu.emit.deferral import defer
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.values import Scalar
from bitnet_triton.triton_cpu.ir import Block, Op, UnsupportedOperation

Handler = Callable[[Emitter, Op], None]
HANDLERS: dict[str, Handler] = {}
TERMINATORS = frozenset(
    {
        "scf.yield",
        "scf.condition",
        "tt.return",
        "tt.reduce.return",
        "tt.scan.return",
        "tt.map_elementwise.return",
    }
)


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register the function that emits the operations ``names``."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def run_block(emitter: Emitter, block: Block) -> Op:
    """Emit the operations of ``block`` up to its terminator, and return that."""
    for op in block.ops:
        if op.name in TERMINATORS:
            return op
        run(emitter, op)
    raise UnsupportedOperation(f"a block without an end: `{block.ops[-1].name}`")


def run(emitter: Emitter, op: Op) -> None:
    """Emit one operation."""
    if op in emitter.done:
        return
    handler = HANDLERS.get(op.name)
    if handler is not None:
        handler(emitter, op)
    elif op.regions or len(op.results) != 1:
        raise op.unsupported()
    elif op.results[0].is_block:
        defer(emitter, op)
    else:
        _run_scalar(emitter, op)
    if emitter.materialise_all:
        for result in op.results:
            if result.uses and result.is_block and emitter.buffer(result) is None:
                materialise(emitter, result)


def _run_scalar(emitter: Emitter, op: Op) -> None:
    result = op.results[0]
    if op.name == "arith.constant":
        emitter.held[result] = Scalar(literal(op.attributes["value"], result.type))
        return
    code = scalar.expression(
        op, [emitter.scalar(v) for v in op.operands], wraps=not emitter.is_address(result)
    )
    emitter.define(result, code)
