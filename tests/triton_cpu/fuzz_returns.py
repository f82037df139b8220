"""Random functions that return early, wherever Triton lets them be called.

All numbers are small and not negative, so that a function of scalars means in Python what it means
in a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_JIT = "@triton.jit\n"
_APART = "@triton.jit(noinline=True)\n"
_IMPORTS = "import triton\nimport triton.language as tl\n\n\n"
_KERNEL = """\
def kernel(x_ptr, i_ptr, a_ptr, b_ptr, n_ptr, fo_ptr, io_ptr, trips, odd):
    pid = tl.program_id(0)
    n_ptr += pid * 2048
    io_ptr += pid * 8192
    i = tl.arange(0, 8)
    x = tl.load(i_ptr + pid) & 1023
    y = tl.load(i_ptr + 8 + pid) & 1023
    t = tl.load(i_ptr + pid * 8 + i) & 1023
    p = n_ptr
"""
_MAPPED = """\
def kernel(x_ptr, y_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.map_elementwise({function}, tl.load(x_ptr + i), tl.load(y_ptr + i))
    tl.store(a_ptr + i, a)
    tl.store(b_ptr + i, b)
"""


@dataclass
class Function:
    """Writes a function. ``state``: what it is given, assigns and returns."""

    pick: Callable[[Sequence[Any]], Any]
    state: tuple[str, ...]
    callees: list[str]
    result: str | None  # what returns give back; None: a kernel, which returns nothing
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    inside_loop: bool = False
    names: int = 0

    def emit(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    @property
    def numbers(self) -> tuple[str, ...]:
        return tuple(name for name in self.state if name in "xy")

    def block(self) -> None:
        for _ in range(self.pick((1, 1, 2))):
            self.statement()

    def statement(self) -> None:
        kinds = [self.assign, self.assign, self.call]
        if "p" in self.state:
            kinds += [self.assign_block, self.memory]
        if self.depth < 4:
            kinds += [self.branch, self.branch, self.branch, self.loop]
        self.pick(kinds)()

    def assign(self) -> None:
        a, b = self.pick(self.numbers), self.pick(self.numbers)
        forms = [f"{a} * 3 + {b}", f"{a} ^ {b}", f"{a} + {self.pick((1, 7, 100))}", f"{a} >> 1"]
        self.emit(f"{self.pick(self.numbers)} = ({self.pick(forms)}) & 1023")

    def assign_block(self) -> None:
        a, c = self.pick(self.numbers), self.pick((3, 50))
        forms = [f"t + {a}", f"tl.where(t > {a}, t >> 1, t + {c})", f"t * {c}", f"t ^ (t + {a})"]
        self.emit(f"t = ({self.pick(forms)}) & 1023")

    def memory(self) -> None:
        a, b = self.pick(self.numbers), self.pick(self.numbers)
        forms = [
            *(f"tl.store(p + ({a} & 63), {b})", f"{a} = tl.load(p + ({b} & 63)) & 1023"),
            *(f"tl.store(p + 64 + tl.arange(0, 8), t + {a})", f"{a} = tl.sum(t) & 1023"),
            "t = (t + tl.load(p + 64 + tl.arange(0, 8))) & 1023",
        ]
        self.emit(self.pick(forms))

    def call(self) -> None:
        if not self.callees:
            return self.assign()
        given = [self.pick(self.numbers) if name in "xy" else name for name in self.state]
        targets = ", ".join(name for name in self.state if name != "p")
        self.emit(f"{targets} = {self.pick(self.callees)}({', '.join(given)})")
        return None

    def condition(self) -> str:
        a, b = self.pick(self.numbers), self.pick(self.numbers)
        return self.pick([f"{a} < {b}", f"({a} & 3) == 1", f"{a} > 300", f"({a} ^ {b}) & 1 == 0"])

    def leave(self) -> None:
        if self.result is None:
            self.emit(f"tl.store(io_ptr + {self.pick((100, 101, 102))}, {self.pick(self.numbers)})")
            self.emit("return")
        else:
            x, y = self.pick(self.numbers), self.pick(self.numbers)
            self.emit(f"return {self.result.format(x=x, y=y)}")

    def branch(self) -> None:
        """Write an if; a path that ends in a return may have others beside and behind it."""
        arms = self.pick((1, 2, 2, 3))
        ends = [not self.inside_loop and self.pick((True, False)) for _ in range(arms)]
        if arms > 1 and all(ends):
            ends[self.pick(range(arms))] = False
        for arm, end in enumerate(ends):
            last = arm == arms - 1 and arms > 1
            self.emit("else:" if last else f"{'elif' if arm else 'if'} {self.condition()}:")
            self.depth += 1
            self.block()
            if end:
                self.leave()
            self.depth -= 1

    def loop(self) -> None:
        before, self.inside_loop = self.inside_loop, True
        self.names += 1
        counter = f"k{self.names}"
        bound = f"{self.pick(self.numbers)} & 3"
        forever = self.pick((True, False))
        if forever:
            self.emit(f"{counter} = {bound}")
            self.emit(f"while {counter} > 0:")
        else:
            self.emit(f"for {counter} in range({bound}):")
        self.depth += 1
        self.emit(f"x = (x + {counter}) & 1023")
        self.block()
        if forever:
            self.emit(f"{counter} = {counter} - 1")
        self.depth -= 1
        self.inside_loop = before


def functions(pick: Callable[[Sequence[Any]], Any], state: tuple[str, ...], result: str) -> str:
    """Return the source of ``f0``, ``f1``, ``f2``, each of which may call those before it."""
    text = ""
    for number in range(3):
        callees = [f"f{earlier}" for earlier in range(number)]
        function = Function(pick, state, callees, result)
        function.branch()
        for _ in range(pick((1, 2))):
            function.statement()
        function.leave()
        body = "\n".join(function.lines)
        # Triton takes no blocks into a function that stays apart
        apart = "t" not in state and pick((False, False, True))
        text += f"{_APART if apart else _JIT}def f{number}({', '.join(state)}):\n{body}\n\n\n"
    return text


def generate(pick: Callable[[Sequence[Any]], Any]) -> str:
    """Return the source of a module with a function ``kernel``, whose state has a block as well."""
    state = ("x", "y", "t", "p")
    text = _IMPORTS + functions(pick, state, "{x}, {y}, t")
    kernel = Function(pick, state, ["f0", "f1", "f2"], None)
    for _ in range(pick((2, 3, 4))):
        kernel.statement()
    kernel.call()
    kernel.emit("tl.store(io_ptr, x)")
    kernel.emit("tl.store(io_ptr + 1, y)")
    kernel.emit("tl.store(io_ptr + 8 + i, t)")
    return text + _JIT + _KERNEL + "\n".join(kernel.lines) + "\n"


def generate_mapped(pick: Callable[[Sequence[Any]], Any]) -> str:
    """Return a module whose ``kernel`` maps ``f2``, a function of two numbers."""
    text = functions(pick, ("x", "y"), "{x}, {y}")
    return _IMPORTS + text + _JIT + _MAPPED.format(function="f2")
