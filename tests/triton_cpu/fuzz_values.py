"""Values of random kernels, and how they are written down, loaded and stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

EXACT = {"float32": 2**24, "float16": 2**11}
BOUND = 64  # of floats that loops carry and memory holds
SIZES = (1, 2, 4, 8, 16)
REGION = 2048  # elements of scratch that one program owns
PROGRAMS = 3

HEADER = """\
import triton
import triton.language as tl


@triton.jit
def product(a, b):
    return a * b


@triton.jit
def linear(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def helper(x, y):
    z = x * 3 - y
    if tl.sum(tl.ravel(z) & 255) > 3000:
        z = z + 1
    return z, x + y


@triton.jit
def kernel(x_ptr, i_ptr, a_ptr, b_ptr, n_ptr, fo_ptr, io_ptr, trips, odd):
    pid = tl.program_id(0)
    a_ptr += pid * 2048
    b_ptr += pid * 2048
    n_ptr += pid * 2048
    fo_ptr += pid * 8192
    io_ptr += pid * 8192
"""


@dataclass(frozen=True)
class Value:
    """A variable of the kernel under construction."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    bound: int = 0  # of a float's magnitude; 0 for integers

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("float")

    @property
    def numel(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass
class Writer:
    """Writes the text of a kernel; ``pick`` chooses one of several things."""

    pick: Callable[[Sequence[Any]], Any]
    lines: list[str] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    indices: dict[tuple[int, ...], str] = field(default_factory=dict)
    count: int = 0
    depth: int = 1

    # writing

    def emit(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def fresh(self, prefix: str = "v") -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def define(self, text: str, dtype: str, shape: tuple[int, ...], bound: int = 0) -> Value:
        value = Value(self.fresh(), dtype, shape, bound)
        self.emit(f"{value.name} = {text}")
        self.values.append(value)
        return value

    def number(self, *choices: int) -> int:
        return self.pick(choices)

    # choosing

    def shape(self) -> tuple[int, ...]:
        rank = self.number(1, 2, 2)
        return tuple(self.pick(SIZES) for _ in range(rank))

    def value(self, keep: Callable[[Value], bool]) -> Value | None:
        found = [v for v in self.values if keep(v)]
        return self.pick(found[-8:]) if found else None

    def tensor(self, keep: Callable[[Value], bool] = lambda v: True) -> Value:
        return self.value(lambda v: v.shape != () and keep(v)) or self.load()

    def integer(self, shape: tuple[int, ...]) -> Value:
        """Return an int32 of this shape."""
        found = self.value(lambda v: v.dtype == "int32" and v.shape == shape)
        return found or self.load("int32", shape)

    def small(self, value: Value, bound: int = BOUND) -> Value:
        """Return ``value``, clamped where it is a float that may be larger than ``bound``."""
        if not value.is_float or value.bound <= bound:
            return value
        text = f"tl.minimum(tl.maximum({value.name}, -{bound}.0), {bound}.0)"
        text += f".to(tl.{value.dtype})"  # the constants are float32
        return self.define(text, value.dtype, value.shape, bound)

    def index(self, shape: tuple[int, ...]) -> str:
        """Return a name for 0, 1, ... in this shape; indices live at the top of the kernel."""
        if shape not in self.indices:
            self.indices[shape] = "f" + "_".join(map(str, shape))
        return self.indices[shape]

    def permuted(self, shape: tuple[int, ...]) -> str:
        """Return an expression of addresses, all different, below 1024."""
        numel = Value("", "", shape).numel
        flat = self.index(shape)
        forms = [
            *(flat, f"({flat} + {self.number(1, 7, 16)})", f"({numel - 1} - {flat})"),
            *(f"({flat} * 3)", f"(({flat} * 5 + {self.number(1, 3)}) % {numel})"),
        ]
        if len(shape) == 2:
            m, n = self.index(shape[:1]), self.index(shape[1:])
            forms.append(f"({n}[None, :] * {shape[0]} + {m}[:, None])")
        return self.pick(forms)

    # memory

    def load(self, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Value:
        dtype = dtype or self.pick(["int32", "float32"])
        shape = self.shape() if shape is None else shape
        if shape == ():
            place = f"({self.number(0, 3, 40)} + pid)"
        else:
            place = self.permuted(shape)
        pointer = self.pick(["i_ptr", "n_ptr"] if dtype == "int32" else ["x_ptr", "a_ptr", "b_ptr"])
        if shape != () and self.number(0, 0, 1):
            data = self.value(lambda v: v.dtype == "int32" and v.shape == shape)
            if data:
                place = f"({data.name} & 255)"
        mask = ""
        if shape != () and self.number(0, 1):
            limit = self.pick(["trips * 4", "odd + 5", "9"])
            other = "-1" if dtype == "int32" else "-2.0"
            mask = f", mask={self.index(shape)} < {limit}, other={other}"
        bound = BOUND if dtype == "float32" else 0
        return self.define(f"tl.load({pointer} + {place}{mask})", dtype, shape, bound)

    def store(self) -> None:
        value = self.tensor(lambda v: v.dtype in ("int32", "float32"))
        value = self.small(value)
        pointer = "n_ptr" if value.dtype == "int32" else self.pick(["a_ptr", "b_ptr"])
        place = self.permuted(value.shape)
        mask = self.pick(["", f", mask={self.index(value.shape)} % 3 != 1"])
        self.emit(f"tl.store({pointer} + {place}, {value.name}{mask})")
        if self.number(0, 1):  # the hazard: what was just stored, in another order
            bound = BOUND if value.is_float else 0
            place = self.permuted(value.shape)
            self.define(f"tl.load({pointer} + {place})", value.dtype, value.shape, bound)

    def store_scalar(self) -> None:
        value = self.value(lambda v: v.shape == () and v.dtype in ("int32", "float32"))
        value = self.small(value or self.load(shape=()))
        pointer = "n_ptr" if value.dtype == "int32" else self.pick(["a_ptr", "b_ptr"])
        self.emit(f"tl.store({pointer} + {self.number(0, 5)}, {value.name})")
