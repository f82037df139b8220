"""The state of an emission: what holds each value, and the C++ written so far.

Every block value is at first a function of its index (``elements.py``): splats, broadcasts, offsets
and arithmetic are inlined into the loop nest that needs them, and the host compiler vectorises
the innermost loop. Values are written to arrays where fusing would be wrong (a load may not move
past a store) or wasteful (something expensive that is read twice).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bitnet_triton.triton_cpu.analyse import address_slice
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.values import Buffer, Held, Scalar
from bitnet_triton.triton_cpu.emit.writer import Writer
from bitnet_triton.triton_cpu.ir import Block, Op, Value


class Emitter(Writer):
    """Writes the body of one kernel, and knows how it holds what it has computed."""

    def __init__(self, function: Op, *, materialise: bool, assume_disjoint: bool) -> None:
        super().__init__()
        self.function = function
        self.materialise_all = materialise
        self.assume_disjoint = assume_disjoint
        self.held: dict[Value, Held] = {}
        # Right operands of products that were packed before a loop, by how they were
        self.packed: dict[tuple[Value, str], str] = {}
        self.disjoint: set[tuple[int, int]] = set()
        self.done: set[Op] = set()
        # Prefetches, by the product that they wait for
        self.fetches: dict[Op, Op] = {}
        self.block: Block = function.regions[0][0]
        self._leave = "return;"
        # Deferred values to watch: they read memory, or cost something
        self.pending: list[Value] = []
        self._addresses = address_slice(function.regions[0])
        # Values of outer blocks that are held in arrays of the current block
        self._borrowed: dict[Value, Held | None] = {}

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

    def hold_in_array(self, value: Value, name: str) -> Buffer:
        """Hold ``value`` in an array of the current block, to the end of that block at most."""
        if value.block is not self.block:
            self._borrowed.setdefault(value, self.held.get(value))
        buffer = Buffer(name, self.block)
        self.held[value] = buffer
        return buffer

    def failure(self, text: str) -> str:
        """Return the statement that ends the program and lets the launch fail.

        Args:
            text: what to say, as C++ writes it.
        """
        return f"{{ fail({text}, pid0, pid1, pid2); {self._leave} }}"

    @contextlib.contextmanager
    def leaving(self, statement: str) -> Iterator[None]:
        """Write code that is left with this statement, not a mere ``return``."""
        saved, self._leave = self._leave, statement
        yield
        self._leave = saved

    def define(self, value: Value, code: str) -> None:
        """Give a scalar value a name of its own."""
        name = self.fresh(value.name or "s")
        self.write(f"{c_type(value.type)} const {name} = {code};")
        self.held[value] = Scalar(name)

    @contextlib.contextmanager
    def scope(self, block: Block) -> Iterator[None]:
        """Emit code that belongs to ``block``; arrays declared in it are forgotten afterwards."""
        saved = self.block, self.pending, self._borrowed
        packed = dict(self.packed)
        self.block, self.pending, self._borrowed = block, [], {}
        yield
        self.packed = packed
        for value, held in self._borrowed.items():
            if held is None:
                del self.held[value]
            else:
                self.held[value] = held
        self.block, self.pending, self._borrowed = saved
