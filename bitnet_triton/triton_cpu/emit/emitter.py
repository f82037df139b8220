"""The state of an emission: what holds each value, and the C++ written so far.

Every block value is at first a function of its index (``element``): splats, broadcasts, offsets
and arithmetic are inlined into the loop nest that needs them, and the host compiler vectorises
the innermost loop. Values are written to arrays where fusing would be wrong (a load may not move
past a store) or wasteful (something expensive that is read twice).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from bitnet_triton.triton_cpu.analyse import address_slice
from bitnet_triton.triton_cpu.emit import scalar
from bitnet_triton.triton_cpu.emit.ctypes import c_type, literal
from bitnet_triton.triton_cpu.emit.deferral import is_dear_to_repeat, must_wait, should_write_out
from bitnet_triton.triton_cpu.emit.elements import ELEMENTS, array_element
from bitnet_triton.triton_cpu.emit.masks import holds_everywhere, outermost
from bitnet_triton.triton_cpu.emit.nest import Nest, loop_pragmas
from bitnet_triton.triton_cpu.emit.split import NOTHING_ASSUMED, Assumption, split_loop
from bitnet_triton.triton_cpu.emit.strides import data_order
from bitnet_triton.triton_cpu.emit.values import Buffer, Held, Index, Lazy, Scalar, row_major
from bitnet_triton.triton_cpu.ir import Block, Op, UnsupportedOperation, Value, used_after

Handler = Callable[["Emitter", Op], None]
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
# Bytes of one array and of all of a program that may lie on a stack (8 MiB by default), if each
# element had 8
_LARGE_ARRAY = 1 << 18
_STACK = 1 << 21


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register the function that emits the operations ``names``."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Emitter:
    """Emits the body of one kernel."""

    def __init__(
        self, function: Op, functions: dict[str, Op], *, materialise: bool, assume_disjoint: bool
    ) -> None:
        self.function = function
        self.functions = functions
        self.materialise_all = materialise
        self.assume_disjoint = assume_disjoint
        self.held: dict[Value, Held] = {}
        # Right operands of products that were packed before a loop, by how they were
        self.packed: dict[tuple[Value, str], str] = {}
        self.disjoint: set[tuple[int, int]] = set()
        self.done: set[Op] = set()
        self.lines: list[str] = []
        self.arena = 0
        self._stack = 0
        self.block: Block = function.regions[0][0]
        self._addresses = address_slice(function.regions[0])
        self._pending: list[Value] = []
        # Values of outer blocks that are held in arrays of the current block
        self._borrowed: dict[Value, Held | None] = {}
        self._depth = 1
        self._names = 0

    # writing -------------------------------------------------------------------------------

    def fresh(self, hint: str) -> str:
        """Return a name that was not used before."""
        self._names += 1
        return f"{hint}_{self._names}"

    def write(self, line: str) -> None:
        """Write one line at the current indentation."""
        self.lines.append("  " * self._depth + line)

    @contextlib.contextmanager
    def braces(self, head: str = "", end: str = "}") -> Iterator[None]:
        """Write ``head {``, the lines of the with block, and ``end``."""
        self.write(f"{head} {{".lstrip())
        self._depth += 1
        yield
        self._depth -= 1
        self.write(end)

    def array(self, size: int, element: str, hint: str = "b", count: str | None = None) -> str:
        """Declare an array.

        Large ones, and all once a program has many, lie in memory that a thread keeps between
        programs: stacks of threads are small.

        Args:
            size: number of elements, or a bound of it.
            element: C++ type, of 8 bytes at most.
            hint: for its name, which is returned.
            count: C++ expression of the number of elements, where only C++ knows it.
        """
        name = self.fresh(hint)
        reserved = -(-size * 8 // 64) * 64
        if reserved <= _LARGE_ARRAY and self._stack + reserved <= _STACK:
            self._stack += reserved
            self.write(f"alignas(64) {element} {name}[{count or max(size, 1)}];")
            return name
        self.write(f"{element}* const {name} = ({element}*)(arena + {self.arena});")
        if count:
            self.write(f"static_assert(sizeof({element}) * {count} <= {reserved}, "
                       '"an operand takes more than is reserved for it");')  # fmt: skip
        self.arena += reserved
        return name

    def packed_array(self, k: int, n: int, element: str) -> str:
        """Declare an array for the right operand [k, n] of a product."""
        bound = -(-k // 4) * 4 * (-(-n // 64) * 64)
        return self.array(bound, element, "packed", f"packed_elements<{element}, {k}, {n}>()")

    # reading values ------------------------------------------------------------------------

    def scalar(self, value: Value) -> str:
        """Return the expression of a scalar."""
        held = self.held[value]
        assert isinstance(held, Scalar)
        return held.code

    def buffer(self, value: Value) -> Buffer | None:
        """Return the array that holds a value, if one does."""
        held = self.held.get(value)
        return held if isinstance(held, Buffer) else None

    def is_address(self, value: Value) -> bool:
        """Tell whether an integer is on its way into an address."""
        return value in self._addresses

    def mark_address(self, value: Value) -> None:
        """Take the arithmetic of ``value`` not to overflow."""
        self._addresses.add(value)

    def element(self, value: Value, index: Index, nest: Nest) -> str:
        """Return the expression of one element; what it needs is written into ``nest``."""
        shape = value.type.shape
        if shape is None:
            return self.scalar(value)
        index = tuple("0" if size == 1 else i for size, i in zip(shape, index))
        key = (value, index)
        if key not in nest.elements:
            nest.elements[key] = self._element(value, index, nest)
        return nest.elements[key]

    def _element(self, value: Value, index: Index, nest: Nest) -> str:
        held = self.held.get(value)
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
            return ELEMENTS[op.name](self, op, value, index, nest)
        operands = [self.element(operand, index, nest) for operand in op.operands]
        return self._compute(op, operands, nest)

    def _compute(self, op: Op, operands: list[str], nest: Nest) -> str:
        simple = scalar.simplified(op, operands)
        if simple is not None:
            return simple
        result = op.results[0]
        code = scalar.expression(op, operands, wraps=not self.is_address(result))
        return nest.bind(c_type(result.type), code)

    # loops ---------------------------------------------------------------------------------

    def loops(
        self,
        sizes: tuple[int, ...],
        body: Callable[[Nest, Index], None],
        order: tuple[int, ...] | None = None,
        *,
        independent: bool = True,
    ) -> None:
        """Write a loop nest over ``sizes``.

        Where the conditions that ``body`` meets can be decided for all elements at once, the nest
        is written a second time without them, and the choice is made at run time.

        Args:
            sizes: number of trips of every dimension.
            body: writes the statements for one index into the nest.
            order: dimensions, outermost first.
            independent: the trips of the innermost loop may run in any order.
        """
        nest, names = self._fill(sizes, body, order, NOTHING_ASSUMED)
        masks = outermost(self, nest.masks)
        if not masks:
            self._write_nest(nest, names, sizes, independent)
            return
        found = [holds_everywhere(self, mask) for mask in masks]
        conditions = " && ".join(dict.fromkeys(c for c in found if c and c != "true"))
        fast = self._fill(sizes, body, order, Assumption(granted=frozenset(masks)))
        if not conditions:
            self._write_nest(*fast, sizes, independent)
            return
        inner = list(names)[-1:]
        split = None
        if inner and independent:
            met = {mask: nest.masks[mask] for mask in masks}
            split = split_loop(self, met, names[inner[0]], sizes[inner[0]])
        with self.braces(f"if ({conditions})"):
            self._write_nest(*fast, sizes, independent)
        if split is not None:
            with self.braces("else" if split.is_certain else f"else if ({split.condition})"):
                for first, end, assumed in split.parts():
                    part = self._fill(sizes, body, order, assumed)
                    self._write_nest(*part, sizes, independent, (first, end))
        if split is None or not split.is_certain:
            with self.braces("else"):
                self._write_nest(nest, names, sizes, independent)

    def _fill(
        self,
        sizes: tuple[int, ...],
        body: Callable[[Nest, Index], None],
        order: tuple[int, ...] | None,
        assumed: Assumption,
    ) -> tuple[Nest, dict[int, str]]:
        names = {d: self.fresh("i") for d in order or range(len(sizes)) if sizes[d] > 1}
        nest = Nest(self, len(names), assumed)
        nest.depth_of.update({name: level + 1 for level, name in enumerate(names.values())})
        body(nest, tuple(names.get(d, "0") for d in range(len(sizes))))
        return nest, names

    def _write_nest(
        self,
        nest: Nest,
        names: dict[int, str],
        sizes: tuple[int, ...],
        independent: bool,
        innermost: tuple[str, str] | None = None,
    ) -> None:
        """Write the loops, the innermost from its first trip to its end, or all of it."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.braces())
            for line in nest.levels[0]:
                self.write(line)
            for level, (dim, name) in enumerate(names.items(), 1):
                if level == len(names):
                    for pragma in loop_pragmas(sizes[dim], independent=independent):
                        self.write(pragma)
                first, end = "0", str(sizes[dim])
                if innermost and level == len(names):
                    first, end = innermost
                head = f"for (int {name} = {first}; {name} < {end}; ++{name})"
                stack.enter_context(self.braces(head))
                for line in nest.levels[level]:
                    self.write(line)

    def element_now(self, value: Value, index: Index) -> str:
        """Compute one element at a constant index, at the current place in the program."""
        nest = Nest(self, 0)
        code = self.element(value, index, nest)
        for line in nest.levels[0]:
            self.write(line)
        return code

    # materialising -------------------------------------------------------------------------

    def store_into(self, value: Value, name: str, c_elem: str | None = None) -> None:
        """Write all elements of ``value`` to an array in row-major order."""
        shape = value.type.shape or ()

        def body(nest: Nest, index: Index) -> None:
            code = self.element(value, index, nest)
            place = row_major(shape, index)
            nest.statement(f"{name}[{place}] = {f'{c_elem}({code})' if c_elem else code};")

        self.loops(shape, body, data_order(self, value))

    def materialise(self, value: Value) -> Buffer:
        """Hold ``value`` in an array of its own, from here on."""
        held = self.held.get(value)
        if isinstance(held, Buffer):
            return held
        name = self.array(value.type.size, c_type(value.type), value.name or "b")
        self.store_into(value, name)
        buffer = Buffer(name, self.block)
        if value.block is not self.block:
            self._borrowed.setdefault(value, held)
        self.held[value] = buffer
        return buffer

    def settle(self, op: Op) -> None:
        """Before a side effect or a region: write out what was read from memory and is needed."""
        waiting = []
        for value in self._pending:
            if isinstance(self.held.get(value), Buffer):
                continue
            if value.block is not op.block:
                waiting.append(value)
            elif used_after(value, op) or (op.regions and op in value.uses):
                self.materialise(value)
        self._pending = waiting

    def reusable(self, value: Value) -> str | None:
        """Return an array that ``value`` may be computed into because an operand dies there."""
        if len(value.uses) != 1:
            return None
        held = self.held.get(value)
        if isinstance(held, Buffer):
            return held.name if held.owner is self.block else None
        op = value.op
        if held is not None or op is None or op.block is not self.block:
            return None
        if not op.name.startswith("arith.") or op.name == "arith.constant":
            return None
        for operand in op.operands:
            if operand.type == value.type and (name := self.reusable(operand)):
                return name
        return None

    # operations ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def scope(self, block: Block) -> Iterator[None]:
        """Emit code that belongs to ``block``; arrays declared in it are forgotten afterwards."""
        saved = self.block, self._pending, self._borrowed
        packed = dict(self.packed)
        self.block, self._pending, self._borrowed = block, [], {}
        yield
        self.packed = packed
        for value, held in self._borrowed.items():
            if held is None:
                del self.held[value]
            else:
                self.held[value] = held
        self.block, self._pending, self._borrowed = saved

    def run_block(self, block: Block) -> Op:
        """Emit the operations of ``block`` up to its terminator, and return that."""
        for op in block.ops:
            if op.name in TERMINATORS:
                return op
            self.run(op)
        raise UnsupportedOperation(f"a block without an end: `{block.ops[-1].name}`")

    def run(self, op: Op) -> None:
        """Emit one operation."""
        if op in self.done:
            return
        handler = HANDLERS.get(op.name)
        if handler is not None:
            handler(self, op)
        elif op.regions or len(op.results) != 1:
            raise op.unsupported()
        elif op.results[0].is_block:
            self.defer(op)
        else:
            self._run_scalar(op)
        if self.materialise_all:
            for result in op.results:
                if result.uses and result.is_block and self.buffer(result) is None:
                    self.materialise(result)

    def _run_scalar(self, op: Op) -> None:
        result = op.results[0]
        if op.name == "arith.constant":
            self.held[result] = Scalar(literal(op.attributes["value"], result.type))
            return
        code = scalar.expression(
            op, [self.scalar(v) for v in op.operands], wraps=not self.is_address(result)
        )
        self.define(result, code)

    def define(self, value: Value, code: str) -> None:
        """Give a scalar value a name of its own."""
        name = self.fresh(value.name or "s")
        self.write(f"{c_type(value.type)} const {name} = {code};")
        self.held[value] = Scalar(name)

    def defer(self, op: Op) -> None:
        """Leave an elementwise operation to the nests that read it, unless that is wasteful."""
        if op.name not in ELEMENTS:
            # Find out now, while the operation's line is known, whether C++ can say it
            scalar.expression(op, ["x"] * len(op.operands), wraps=True)
        for result in op.results:
            if op.name == "tt.broadcast":
                # what is repeated, not its repetitions
                source = op.operands[0]
                if is_dear_to_repeat(self, source) or should_write_out(self, result):
                    self.materialise(source)
                elif must_wait(self, result):
                    self._pending.append(result)
            elif should_write_out(self, result):
                self.materialise(result)
            elif must_wait(self, result):
                self._pending.append(result)
