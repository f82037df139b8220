"""A loop nest under construction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bitnet_triton.triton_cpu.emit.writer import Writer
from bitnet_triton.triton_cpu.ir import Value

# Where an element stands: a C++ expression for every dimension
Index = tuple[str, ...]

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
# GCC unrolls loops of so few trips before it vectorises, and versions 11 and 12 then mix up groups
# of lanes in some nests; kept as loops they are vectorised right, and as well
_SHORT_LOOP = 16


def loop_pragmas(trips: int, *, independent: bool = True) -> list[str]:
    """Return what stands above the innermost loop of a nest.

    Args:
        trips: of the loop.
        independent: they may run in any order.
    """
    pragmas = ["#pragma GCC ivdep"] if independent else []
    return [*pragmas, "#pragma GCC unroll 1"] if trips <= _SHORT_LOOP else pragmas


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


class Nest:
    """Collects statements, each at the outermost loop whose index it depends on.

    Attributes:
        levels: the statements before the first loop, inside the first, inside the second, ...
        depth_of: the level of every name that was bound here.
        elements: expressions of elements that were already computed.
        masks: conditions met on the way, candidates for a version without them, each with the
            indices at which it is asked for, in its own dimensions.
        assumed: what is taken to be known of conditions.
    """

    def __init__(self, writer: Writer, loops: int, assumed: Assumption = NOTHING_ASSUMED) -> None:
        self._writer = writer
        self.levels: list[list[str]] = [[] for _ in range(loops + 1)]
        self.depth_of: dict[str, int] = {}
        self.elements: dict[tuple[Value, Index], str] = {}
        self.masks: dict[Value, set[Index]] = {}
        self.assumed = assumed

    def meet_masks(self, masks: Mapping[Value, set[Index]]) -> None:
        """Note conditions, and at which indices they are asked for."""
        for mask, indices in masks.items():
            self.masks.setdefault(mask, set()).update(indices)

    def level(self, *expressions: str) -> int:
        """Return the outermost level at which all the names in ``expressions`` are known."""
        return max(
            (self.depth_of.get(n, 0) for e in expressions for n in _IDENTIFIER.findall(e)),
            default=0,
        )

    def bind(self, c_type: str, expression: str, *depends: str, hint: str = "t") -> str:
        """Name an expression, at the outermost level where it can be computed."""
        level = self.level(expression, *depends)
        name = self._writer.fresh(hint)
        self.levels[level].append(f"{c_type} const {name} = {expression};")
        self.depth_of[name] = level
        return name

    def statement(self, code: str) -> None:
        """Add a statement to the innermost loop."""
        self.levels[-1].append(code)
