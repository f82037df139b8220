"""Control flow as the emitter wants it: one block a region, nested branches, functions inlined.

Triton writes an ``if`` that returns as jumps between blocks. Its passes keep such a function whole
where it is called inside a loop, a branch or a combining function, for jumps do not fit in there;
functions under ``noinline`` they keep everywhere. Here jumps become branches (``scf.if``), one
where each path parts from the others and one where paths meet again, and then all calls go.

The jumps of Triton's front end only lead ahead, because it takes no ``return`` inside a loop. So
the blocks that a block dominates follow it in the order in which control reaches them; what a path
takes along, and whether control came along it, are the results of the branches it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bitnet_triton.triton_cpu.ir import Block, Op, Type, Value

# Ends the program where its operand holds; only at the outermost level of a kernel
RETURN_IF = "triton_cpu.return_if"

_BOOLEAN = Type(None, "i1")


def structure(kernel: Op, functions: dict[str, Op], keep: Callable[[str], bool]) -> None:
    """Make one block of every region of ``kernel``, and inline the functions that it calls.

    Args:
        kernel: changed in place.
        functions: of the module, by name; those that are called are changed as well.
        keep: tells of a function's name whether calls of it stay.

    Raises:
        UnsupportedOperation: a function is unknown or calls itself, or jumps lead back.
    """
    renamed: dict[Value, Value] = {}
    _Inliner(functions, keep, renamed).regions(kernel, is_kernel=True)
    _relink(kernel, renamed)


def _relink(op: Op, renamed: dict[Value, Value]) -> None:
    """Put new values in the place of old ones, and note again where all stands and who reads it."""
    for block in (block for region in op.regions for block in region):
        block.parent = op
        for index, inner in enumerate(block.ops):
            inner.block, inner.index = block, index
        for value in (*block.args, *(result for inner in block.ops for result in inner.results)):
            value.block = block
            value.uses = []
        for inner in block.ops:
            _relink(inner, renamed)
            inner.operands = [_current(operand, renamed) for operand in inner.operands]
            for operand in inner.operands:
                operand.uses.append(inner)


def _current(value: Value, renamed: dict[Value, Value]) -> Value:
    while value in renamed:
        value = renamed[value]
    return value


@dataclass
class _Inliner:
    functions: dict[str, Op]
    keep: Callable[[str], bool]
    renamed: dict[Value, Value]

    def __post_init__(self) -> None:
        self._ready: set[Op] = set()
        self._open: list[Op] = []

    def regions(self, op: Op, *, is_kernel: bool = False) -> None:
        """Make one block without calls of every region of ``op``."""
        for region in op.regions:
            for block in region:
                block.ops = [new for old in block.ops for new in self._operation(old)]
            if len(region) > 1:
                merger = _Merger(region, self.renamed, is_kernel=is_kernel)
                region[:] = [merger.merged()]

    def _operation(self, op: Op) -> list[Op]:
        """Return what takes the place of ``op``: itself, or the function's body."""
        self.regions(op)
        if op.name != "tt.call":
            return [op]
        name = op.attributes["callee"].lstrip("@").strip('"')
        if self.keep(name):
            return [op]
        function = self.functions.get(name)
        if function is None or function in self._open:
            why = "is not known" if function is None else "calls itself"
            raise op.unsupported(f"the function `{name}` {why}")
        if function not in self._ready:
            self._open.append(function)
            self.regions(function)
            self._open.remove(function)
            self._ready.add(function)
        body = function.regions[0][0]
        known = dict(zip(body.args, op.operands))
        *copies, end = [self._copy(inner, known) for inner in body.ops]
        self.renamed.update(zip(op.results, end.operands))
        return copies

    def _copy(self, op: Op, known: dict[Value, Value]) -> Op:
        """Copy an operation; ``known`` says what stands for the values that it reads."""
        operands = [_current(operand, self.renamed) for operand in op.operands]
        operands = [known.get(operand, operand) for operand in operands]
        copy = Op(op.name, operands, [], dict(op.attributes), [], [], op.location)
        copy.results = [Value(result.type, result.name, op=copy) for result in op.results]
        known.update(zip(op.results, copy.results))
        for region in op.regions:
            copy.regions.append([self._copy_block(block, known) for block in region])
        return copy

    def _copy_block(self, block: Block, known: dict[Value, Value]) -> Block:
        copy = Block([Value(value.type, value.name) for value in block.args])
        known.update(zip(block.args, copy.args))
        copy.ops = [self._copy(op, known) for op in block.ops]
        return copy


@dataclass
class _Exit:
    """A way on from what was merged so far.

    Attributes:
        flag: whether control goes this way; None where it does in any case.
        values: what it takes along.
    """

    flag: Value | None
    values: list[Value]


# By the block that they lead to; None stands for the end of the region
_Exits = dict[Block | None, _Exit]


class _Merger:
    """Makes one block of the blocks of a region.

    Args:
        blocks: of the region, whose jumps lead ahead.
        renamed: gets what the arguments of blocks and the results of calls are.
        is_kernel: control that leaves the region ends the program.
    """

    def __init__(
        self, blocks: list[Block], renamed: dict[Value, Value], *, is_kernel: bool
    ) -> None:
        self._first = blocks[0]
        self._by_label = {block.label: block for block in blocks}
        self._renamed = renamed
        self._is_kernel = is_kernel
        self._order = self._in_order()
        self._entries = dict.fromkeys(self._order, 0)
        for block in self._order:
            for target in self._targets(block):
                self._entries[target] += 1
        self._dominator = self._dominators()
        ends = [b.ops[-1] for b in self._order if not b.ops[-1].successors]
        self._end = ends[0]

    def merged(self) -> Block:
        """Return the one block."""
        ops: list[Op] = []
        exits = self._block(self._first, ops, outermost=self._is_kernel)
        self._write(ops, self._end.name, exits[None].values)
        return Block(self._first.args, label=self._first.label, ops=ops)

    # the graph

    def _targets(self, block: Block) -> list[Block]:
        return [self._by_label[label] for label in block.ops[-1].successors]

    def _in_order(self) -> list[Block]:
        """Return the blocks that control reaches, each behind those from which it is reached."""
        done: dict[Block, None] = {}
        path = [(self._first, iter(self._targets(self._first)))]
        while path:
            block, targets = path[-1]
            target = next((t for t in targets if t not in done), None)
            if target is None:
                done[block] = None
                path.pop()
            elif any(target is passed for passed, _ in path):
                raise block.ops[-1].unsupported("it jumps back")
            else:
                path.append((target, iter(self._targets(target))))
        return list(done)[::-1]

    def _dominators(self) -> dict[Block, Block]:
        """Return the last block that every way to a block leads through, of all but the first."""
        place = {block: number for number, block in enumerate(self._order)}
        found: dict[Block, Block] = {}
        for block in self._order:
            for target in self._targets(block):
                common, other = found.get(target, block), block
                while common is not other:
                    if place[common] < place[other]:
                        other = found[other]
                    else:
                        common = found[common]
                found[target] = common
        return found

    def _ending(self, targets: list[Block]) -> int | None:
        """Return which of two ways ends the program, rather by itself than after something else."""
        for ends in (self._is_end, self._only_ends):
            for place, target in enumerate(targets):
                if ends(target):
                    return place
        return None

    def _only_ends(self, target: Block) -> bool:
        """Tell whether all that follows on a jump to ``target`` follows on nothing else."""
        if self._entries[target] > 1:
            return False
        seen, work = {target}, [target]
        while work:
            for following in self._targets(work.pop()):
                if following not in seen and not self._is_end(following):
                    seen.add(following)
                    work.append(following)
        return all(self._dominates(target, block) for block in seen)

    def _dominates(self, block: Block, other: Block) -> bool:
        while other is not block:
            if other not in self._dominator:
                return False
            other = self._dominator[other]
        return True

    @staticmethod
    def _is_end(block: Block) -> bool:
        return len(block.ops) == 1 and not block.ops[0].successors

    # from jumps to branches

    def _block(self, block: Block, ops: list[Op], *, outermost: bool) -> _Exits:
        """Write what a block does, and those that it dominates; return the ways on from there."""
        ops += block.ops[:-1]
        exits = self._jump(block.ops[-1], ops, outermost)
        for target in [b for b in self._order if self._dominator.get(b) is block]:
            if target not in exits:  # it stands in a branch already
                continue
            taken = exits.pop(target)
            self._renamed.update(zip(target.args, taken.values))
            if not exits:
                exits = self._block(target, ops, outermost=outermost)
                continue
            assert taken.flag is not None
            inner: list[Op] = []
            ways = self._block(target, inner, outermost=False)
            exits = self._branch(taken.flag, [(inner, ways), ([], exits)], ops)
            if outermost:
                self._leave(exits, ops)
        return exits

    def _jump(self, end: Op, ops: list[Op], outermost: bool) -> _Exits:
        operands = [self._now(operand) for operand in end.operands]
        if not end.successors:
            return {None: _Exit(None, operands)}
        targets = [self._by_label[label] for label in end.successors]
        if end.name == "cf.br":
            return self._follow(targets[0], operands, ops, outermost=outermost)
        if end.name != "cf.cond_br":
            raise end.unsupported()
        condition, *operands = operands
        count = len(targets[0].args)
        passed = operands[:count], operands[count:]
        if outermost:
            place = self._ending(targets)
            if place is not None:
                inner: list[Op] = []
                self._follow(targets[place], passed[place], inner, outermost=False)
                flag = condition if place == 0 else self._negated(condition, ops)
                if inner:
                    self._branch(flag, [(inner, {}), ([], {})], ops)
                self._write(ops, RETURN_IF, [flag])
                place = 1 - place
                return self._follow(targets[place], passed[place], ops, outermost=True)
        arms: list[tuple[list[Op], _Exits]] = []
        for target, values in zip(targets, passed):
            inner = []
            arms.append((inner, self._follow(target, values, inner, outermost=False)))
        exits = self._branch(condition, arms, ops)
        if outermost:
            self._leave(exits, ops)
        return exits

    def _follow(
        self, target: Block, values: list[Value], ops: list[Op], *, outermost: bool
    ) -> _Exits:
        """Write what follows on a jump, where nothing else leads to it."""
        if self._is_end(target):
            known = dict(zip(target.args, values))
            operands = [self._now(operand) for operand in target.ops[0].operands]
            return {None: _Exit(None, [known.get(operand, operand) for operand in operands])}
        if self._entries[target] > 1:
            return {target: _Exit(None, values)}
        self._renamed.update(zip(target.args, values))
        return self._block(target, ops, outermost=outermost)

    def _leave(self, exits: _Exits, ops: list[Op]) -> None:
        """End the program where control has reached its end, if it may also go on."""
        if None in exits and len(exits) > 1:
            flag = exits.pop(None).flag
            assert flag is not None
            self._write(ops, RETURN_IF, [flag])

    def _branch(
        self, condition: Value, arms: list[tuple[list[Op], _Exits]], ops: list[Op]
    ) -> _Exits:
        """Write a branch of two arms; return the ways on from both."""
        inside = [{value for op in inner for value in op.results} for inner, _ in arms]
        yielded: list[tuple[Value, Value]] = []
        results: list[Value] = []

        def choose(values: list[Value | None]) -> Value:
            """Return what one of two values becomes behind the branch; None is never read."""
            given = [value for value in values if value is not None]
            if all(value is given[0] for value in given):
                arm = 0 if values[0] is not None else 1
                if given[0] not in inside[arm]:
                    return given[0]
            type_, name = given[0].type, given[0].name
            either, other = (
                self._write(ops, "ub.poison", [], [Value(type_, name)]).results[0]
                if value is None
                else value
                for value in values
            )
            yielded.append((either, other))
            results.append(Value(type_, name))
            return results[-1]

        exits: _Exits = {}
        for target in dict.fromkeys(target for _, ways in arms for target in ways):
            sides = [ways.get(target) for _, ways in arms]
            flag = None
            if len({target for _, ways in arms for target in ways}) > 1:
                flag = self._flag(condition, sides, choose, ops)
            count = max(len(side.values) for side in sides if side is not None)
            values = [
                choose([None if side is None else side.values[place] for side in sides])
                for place in range(count)
            ]
            exits[target] = _Exit(flag, values)
        self._write_branch(condition, [inner for inner, _ in arms], yielded, results, ops)
        return exits

    def _flag(
        self,
        condition: Value,
        sides: list[_Exit | None],
        choose: Callable[[list[Value | None]], Value],
        ops: list[Op],
    ) -> Value:
        """Return whether control goes one way behind a branch, by what its arms say."""
        if all(side is None or side.flag is None for side in sides):
            return condition if sides[1] is None else self._negated(condition, ops)
        return choose(
            [
                self._constant(side is not None, ops) if side is None or side.flag is None
                else side.flag
                for side in sides
            ]
        )  # fmt: skip

    def _write_branch(
        self, condition: Value, arms: list[list[Op]], yielded: list[tuple[Value, Value]],
        results: list[Value], ops: list[Op],
    ) -> None:  # fmt: skip
        if not any(arms):
            for result, values in zip(results, yielded):
                self._write(ops, "arith.select", [condition, *values], [result])
            return
        branch = self._write(ops, "scf.if", [condition], results)
        for place, inner in enumerate(arms):
            self._write(inner, "scf.yield", [values[place] for values in yielded])
            branch.regions.append([Block([], ops=inner)])

    # operations

    def _now(self, value: Value) -> Value:
        return _current(value, self._renamed)

    def _write(
        self, ops: list[Op], name: str, operands: Iterable[Value], results: Iterable[Value] = ()
    ) -> Op:
        op = Op(name, list(operands), list(results), {}, [], [], self._end.location)
        for result in op.results:
            result.op = op
        ops.append(op)
        return op

    def _constant(self, holds: bool, ops: list[Op]) -> Value:
        op = self._write(ops, "arith.constant", [], [Value(_BOOLEAN, "flag")])
        op.attributes["value"] = "true" if holds else "false"
        return op.results[0]

    def _negated(self, condition: Value, ops: list[Op]) -> Value:
        operands = [condition, self._constant(True, ops)]
        return self._write(ops, "arith.xori", operands, [Value(_BOOLEAN, "flag")]).results[0]
