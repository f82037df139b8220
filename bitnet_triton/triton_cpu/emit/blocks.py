"""The blocks of a kernel: early returns, and jumps that are neither loops nor branches."""

from __future__ import annotations

from bitnet_triton.triton_cpu.emit.control import assign, declare, stage
from bitnet_triton.triton_cpu.emit.dispatch import handles, run
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.values import Held
from bitnet_triton.triton_cpu.ir import Block, Op, Value

_NEGATED = "triton_cpu.negated"


@handles("cf.cond_br")
def _return_if(emitter: Emitter, op: Op) -> None:
    sign = "!" if op.attributes.get(_NEGATED) else ""
    emitter.write(f"if ({sign}{emitter.scalar(op.operands[0])}) return;")


def merge_returns(function: Op) -> bool:
    """Make one block of a kernel whose blocks are joined by early returns only, if that is so.

    Triton writes ``if c: return`` as a conditional branch to a block that returns.
    """
    blocks = function.regions[0]
    returns = {b.label for b in blocks[1:] if len(b.ops) == 1 and b.ops[0].name == "tt.return"}
    by_label = {block.label: block for block in blocks}
    chain, seen = [blocks[0]], {blocks[0].label}
    while (following := _following(chain[-1].ops[-1], returns)) is not None:
        if following in seen or following not in by_label or by_label[following].args:
            return False
        seen.add(following)
        chain.append(by_label[following])
    if len(seen | returns) < len(blocks):
        return False
    function.regions[0] = [_merged(function, chain, returns)]
    return True


def _following(end: Op, returns: set[str]) -> str | None:
    """Return the label of the one block that can follow; "" if there are several."""
    targets = {label for label in end.successors if label not in returns}
    if end.name == "cf.br" and not targets:
        return end.successors[0]
    return None if end.name == "tt.return" else targets.pop() if len(targets) == 1 else ""


def _merged(function: Op, chain: list[Block], returns: set[str]) -> Block:
    merged = Block(chain[0].args, parent=function)
    for block in chain:
        for op in block.ops:
            if op.name == "cf.br":
                continue
            if op.name == "cf.cond_br" and op.successors[0] not in returns:
                op.attributes[_NEGATED] = "true"
            merged.append(op)
    for value in (*merged.args, *(value for op in merged.ops for value in op.results)):
        value.block = merged
    return merged


def run_blocks(emitter: Emitter, blocks: list[Block]) -> None:
    """Emit blocks that jump to each other, with labels.

    Values that several blocks read are stored in variables that are declared before all blocks.
    """
    labels = {block.label: emitter.fresh("block") for block in blocks}
    # in order, unlike a set: the same kernel is the same text in every process, and compiled once
    crossing = [
        value
        for block in blocks
        for op in block.ops
        for value in op.results
        if any(not use.block.inside(block) for use in value.uses if use.block is not None)
    ]
    places: dict[Value, Held] = {}
    for value in (*(a for block in blocks[1:] for a in block.args), *crossing):
        declare(emitter, value)
        places[value] = emitter.held[value]
    for value in crossing:
        del emitter.held[value]
    for block in blocks:
        emitter.write(f"{labels[block.label]}:;")
        with emitter.braces(), emitter.scope(block):
            for op in block.ops[:-1]:
                run(emitter, op)
                _keep(emitter, op, places)
            _jump(emitter, block.ops[-1], blocks, labels)


def _keep(emitter: Emitter, op: Op, places: dict[Value, Held]) -> None:
    """Store results that other blocks read."""
    for result in op.results:
        if result in places:
            assign(emitter, places[result], result)
            emitter.held[result] = places[result]


def _jump(emitter: Emitter, end: Op, blocks: list[Block], labels: dict[str, str]) -> None:
    if end.name == "tt.return":
        emitter.write("return;")
        return
    arguments = {block.label: block.args for block in blocks}
    passed = list(end.operands)
    heads = [""]
    if end.name == "cf.cond_br":
        heads = [f"if ({emitter.scalar(passed.pop(0))})", "else"]
    elif end.name != "cf.br":
        raise end.unsupported()
    for head, label in zip(heads, end.successors):
        targets = arguments[label]
        values, passed = passed[: len(targets)], passed[len(targets) :]
        with emitter.braces(head):
            stage(emitter, targets, values)
            emitter.write(f"goto {labels[label]};")
