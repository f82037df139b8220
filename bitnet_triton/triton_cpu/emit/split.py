"""Split a loop where its masks end, so that neither part has to ask.

Rows are seldom as long as the block that holds them: ``cols < n`` lets the first elements pass and
stops the rest. Compilers do not vectorise every loop that asks for each element; the first part
has nothing to ask, and the second reads no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitnet_triton.triton_cpu.emit.masks import prefix
from bitnet_triton.triton_cpu.ir import Value

if TYPE_CHECKING:
    from bitnet_triton.triton_cpu.emit.emitter import Emitter

# Shorter loops are not worth the code
_LONG_LOOP = 128


@dataclass(frozen=True)
class Assumption:
    """What is taken to be known of the conditions in one part of a loop.

    Attributes:
        granted: conditions that hold for every element.
        denied: conditions that hold for none.
    """

    granted: frozenset[Value] = frozenset()
    denied: frozenset[Value] = frozenset()

    def known(self, mask: Value) -> str | None:
        """Return the C++ constant that a condition is, if that is known."""
        if mask in self.granted:
            return "true"
        return "false" if mask in self.denied else None


NOTHING_ASSUMED = Assumption()


@dataclass(frozen=True)
class Split:
    """Where the masks of a loop end.

    Attributes:
        condition: C++ expression under which the split is right; "true" for always.
        ends: C++ names of where each mask ends, by mask.
        lowest: where the first of them ends.
        highest: where the last of them ends.
        size: number of trips of the loop.
    """

    condition: str
    ends: dict[Value, str]
    lowest: str
    highest: str
    size: int

    @property
    def is_certain(self) -> bool:
        """Tell whether the split is always right."""
        return self.condition == "true"

    def parts(self) -> Iterator[tuple[str, str, Assumption]]:
        """Yield the parts of the loop: first trip, end, and what is known there."""
        masks = frozenset(self.ends)
        yield "0", self.lowest, Assumption(granted=masks)
        if len(masks) > 1:
            yield self.lowest, self.highest, NOTHING_ASSUMED
        yield self.highest, str(self.size), Assumption(denied=masks)


def split_loop(emitter: Emitter, masks: list[Value], dim: int, size: int) -> Split | None:
    """Return where a loop of ``size`` trips along ``dim`` can be split; None if it cannot.

    What the split needs is written at the current place in the program.
    """
    if size < _LONG_LOOP:
        return None
    conditions: list[str] = []
    ends: dict[Value, str] = {}
    for mask in masks:
        found = prefix(emitter, mask, dim)
        if found is None or not found[1]:
            return None
        conditions += [c for c in found[0] if c != "true"]
        ends[mask] = emitter.fresh("end")
        emitter.write(f"int64_t {ends[mask]} = {size};")
        for count in found[1]:
            emitter.write(f"if ({count} < {ends[mask]}) {ends[mask]} = {count};")
        emitter.write(f"if ({ends[mask]} < 0) {ends[mask]} = 0;")
    lowest, *others = ends.values()
    highest = lowest
    for other in others:
        low, high = emitter.fresh("low"), emitter.fresh("high")
        emitter.write(f"int64_t const {low} = {lowest} < {other} ? {lowest} : {other};")
        emitter.write(f"int64_t const {high} = {highest} < {other} ? {other} : {highest};")
        lowest, highest = low, high
    return Split(" && ".join(dict.fromkeys(conditions)) or "true", ends, lowest, highest, size)
