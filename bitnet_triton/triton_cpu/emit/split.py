"""Split a loop where its masks end, so that neither part has to ask.

Rows are seldom as long as the block that holds them: ``cols < n`` lets the first elements pass and
stops the rest. Compilers do not vectorise every loop that asks for each element; the first part
has nothing to ask, and the second reads no memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.masks import prefix
from bitnet_triton.triton_cpu.emit.nest import NOTHING_ASSUMED, Assumption, Index
from bitnet_triton.triton_cpu.ir import Value

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
# Shorter loops are not worth the code
_LONG_LOOP = 128


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


def _place(indices: set[Index], name: str) -> int | None:
    """Return the dimension of all ``indices`` that is ``name``, which no other one depends on."""
    found = set()
    for index in indices:
        places = [d for d, at in enumerate(index) if name in _IDENTIFIER.findall(at)]
        found.add(places[0] if len(places) == 1 and index[places[0]] == name else None)
    return found.pop() if len(found) == 1 else None


def split_loop(
    emitter: Emitter, masks: Mapping[Value, set[Index]], name: str, size: int
) -> Split | None:
    """Return where a loop of ``size`` trips over ``name`` can be split; None if it cannot.

    Conditions come with the indices at which the loop asks for them: below a transposition, or what
    else moves elements, their dimensions are not those of the loop. What the split needs is written
    at the current place in the program.
    """
    if size < _LONG_LOOP:
        return None
    conditions: list[str] = []
    ends: dict[Value, str] = {}
    for mask, indices in masks.items():
        dim = _place(indices, name)
        found = None if dim is None else prefix(emitter, mask, dim)
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
