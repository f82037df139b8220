"""The C++ that was written so far: its lines, names and arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# Bytes of one array and of all of a program that may lie on a stack (8 MiB by default), if each
# element had 8
_LARGE_ARRAY = 1 << 18
_STACK = 1 << 21


class Writer:
    """Writes the body of one function.

    Attributes:
        lines: the body.
        arena: bytes that it needs for arrays beside its stack.
        stack: bytes that it needs for arrays on its stack.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.arena = 0
        self.stack = 0
        self._depth = 1
        self._names = 0

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
        if reserved <= _LARGE_ARRAY and self.stack + reserved <= _STACK:
            self.stack += reserved
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
