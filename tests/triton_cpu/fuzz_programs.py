"""Random Triton kernels whose results are the same in every order of evaluation.

Integers wrap, and floats hold integers small enough that no operation rounds: sums may be added in
any order and products contracted, and still every run agrees to the last bit.
"""

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
class Program:
    """Writes statements; ``pick`` chooses one of several things."""

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

    # statements

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
        if value is None:
            return self.reduce()
        value = self.small(value)
        pointer = "n_ptr" if value.dtype == "int32" else self.pick(["a_ptr", "b_ptr"])
        self.emit(f"tl.store({pointer} + {self.number(0, 5)}, {value.name})")
        return None

    def operand(self, left: Value) -> Value | None:
        """Return a value of the same dtype that broadcasts with ``left``."""

        def fits(v: Value) -> bool:
            if v.dtype != left.dtype:
                return False
            if v.shape == () or left.shape == () or v.shape == left.shape:
                return True
            if len(v.shape) != len(left.shape):
                return False
            return all(a == b or a == 1 or b == 1 for a, b in zip(v.shape, left.shape))

        return self.value(fits)

    @staticmethod
    def broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        if a == () or b == ():
            return a or b
        return tuple(max(x, y) for x, y in zip(a, b))

    def arithmetic(self) -> None:
        left = self.tensor(lambda v: v.dtype != "int1")
        right = self.operand(left) or left
        shape = self.broadcast(left.shape, right.shape)
        a, b = left.name, right.name
        if left.is_float:
            limit = EXACT[left.dtype]
            total, larger = left.bound + right.bound, max(left.bound, right.bound)
            forms = [(f"tl.maximum({a}, {b})", larger), (f"tl.where({a} > {b}, {a}, -{b})", larger)]
            forms += [(f"{a} + {b}", total), (f"{a} - {b}", total), (f"tl.abs({a}) + {b}", total)]
            forms += [
                (f"{a} * {b}", left.bound * right.bound),
                (f"{a} * 3 - 1", left.bound * 3 + 1),
            ]
            forms = [form for form in forms if form[1] < limit]
            text, bound = self.pick(forms)
            self.define(text, left.dtype, shape, bound)
            return
        forms = [
            *(f"{a} + {b}", f"{a} - {b}", f"{a} * {b}", f"{a} ^ {b}", f"{a} & {b}", f"{a} | {b}"),
            *(f"{a} // (({b} & 7) + 1)", f"{a} % (({b} & 7) + 1)", f"{a} << ({b} & 7)"),
            *(f"{a} >> ({b} & 7)", f"tl.where({a} < {b}, {a}, {b} - 1)", f"tl.minimum({a}, {b})"),
            *(f"-{a} + 5", f"tl.abs({a})", f"{a} * 37 + {b}"),
        ]
        self.define(self.pick(forms), left.dtype, shape)

    def convert(self) -> None:
        value = self.tensor()
        if value.dtype == "int1":
            self.define(f"{value.name}.to(tl.int32)", "int32", value.shape)
        elif value.is_float:
            target = self.pick(["int32", "int64", "float32", "float16"])
            value = self.small(value) if target == "float16" else value
            bound = value.bound if target.startswith("float") else 0
            self.define(f"{value.name}.to(tl.{target})", target, value.shape, bound)
        else:
            target = self.pick(["int8", "int64", "int32", "float32", "float16"])
            if target.startswith("float"):
                text = f"({value.name} & 15).to(tl.{target})"
                self.define(text, target, value.shape, 15)
            else:
                self.define(f"{value.name}.to(tl.{target})", target, value.shape)

    def compare(self) -> None:
        left = self.tensor(lambda v: v.dtype != "int1")
        right = self.operand(left) or left
        shape = self.broadcast(left.shape, right.shape)
        operator = self.pick(["<", "<=", "==", "!=", ">"])
        mask = self.define(f"{left.name} {operator} {right.name}", "int1", shape)
        other = self.value(lambda v: v.shape == shape and v.dtype == left.dtype)
        if other:
            text = f"tl.where({mask.name}, {other.name}, {left.name})"
            self.define(text, left.dtype, shape, max(other.bound, left.bound))

    def reduce(self) -> None:
        value = self.tensor(lambda v: v.dtype != "int1")
        axis = self.number(*range(len(value.shape)))
        shape = value.shape[:axis] + value.shape[axis + 1 :]
        size, name = value.shape[axis], value.name
        wide = {"int8": "int32", "float16": "float32"}.get(value.dtype, value.dtype)
        kinds = ["max", "min", "argmax", "argmin", "sum", "sum"]
        kinds += [] if value.is_float else ["xor_sum", "product"]
        kind = self.pick(kinds)
        if kind in ("max", "min"):
            keep = self.pick(["", ", keep_dims=True"])
            shape = (*shape[:axis], 1, *shape[axis:]) if keep else shape
            self.define(f"tl.{kind}({name}, {axis}{keep})", wide, shape, value.bound)
        elif kind in ("argmax", "argmin"):
            self.define(f"tl.{kind}({name}, {axis})", "int32", shape)
        elif kind == "sum":
            if value.is_float:
                value = self.small(value, max(1, min(BOUND, EXACT[value.dtype] // size // 2)))
                text = f"tl.sum({value.name}, {axis})"
                self.define(text, value.dtype, shape, value.bound * size)
            else:  # NumPy has scalars that do not wrap
                name = f"{name} & 1023" if shape == () and value.dtype != "int8" else name
                self.define(f"tl.sum({name}, {axis})", wide, shape)
        elif kind == "xor_sum":
            self.define(f"tl.xor_sum({name}, {axis})", value.dtype, shape)
        else:
            self.define(f"tl.reduce({name}, {axis}, product)", value.dtype, shape)

    def scan(self) -> None:
        value = self.tensor(lambda v: v.dtype in ("int32", "float32", "int64"))
        axis = self.number(*range(len(value.shape)))
        reverse = self.pick(["", ", reverse=True"])
        if value.is_float:
            value = self.small(value)
            bound = value.bound * value.shape[axis]
            self.define(f"tl.cumsum({value.name}, {axis}{reverse})", "float32", value.shape, bound)
        elif self.number(0, 0, 1):
            other = self.value(lambda v: v.dtype == value.dtype and v.shape == value.shape)
            pair = f"({value.name}, {(other or value).name})"
            name, second = self.fresh(), self.fresh()
            self.emit(f"{name}, {second} = tl.associative_scan({pair}, {axis}, linear{reverse})")
            self.values += [Value(n, value.dtype, value.shape) for n in (name, second)]
        else:
            self.define(f"tl.cumsum({value.name}, {axis}{reverse})", value.dtype, value.shape)

    def move(self) -> None:
        value = self.tensor(lambda v: v.dtype != "int1")
        name, shape = value.name, value.shape
        forms = [(f"tl.reshape({name}, ({value.numel},))", (value.numel,))]
        forms += [(f"tl.broadcast_to({name}[None, :], (4, {shape[0]}))", (4, *shape))] * (
            len(shape) == 1 and value.numel <= 32
        )
        if len(shape) == 1:
            forms += [(f"{name}[:, None]", (*shape, 1)), (f"{name}[None, :]", (1, *shape))]
            if shape[0] > 1:
                half = (2, shape[0] // 2)
                forms += [(f"tl.reshape({name}, {half})", half), (f"tl.flip({name}, 0)", shape)]
        else:
            turned = shape[::-1]
            forms += [(f"tl.trans({name})", turned), (f"tl.reshape({name}, {turned})", turned)]
        text, shape = self.pick(forms)
        self.define(text, value.dtype, shape, value.bound)

    def join(self) -> None:
        left = self.tensor(lambda v: v.dtype != "int1" and len(v.shape) == 1 and v.numel <= 64)
        if len(left.shape) != 1:
            return
        right = self.value(lambda v: v.dtype == left.dtype and v.shape == left.shape) or left
        bound = max(left.bound, right.bound)
        if self.number(0, 1):
            shape = (2 * left.shape[0],)
            self.define(f"tl.interleave({left.name}, {right.name})", left.dtype, shape, bound)
            return
        pair = f"tl.join({left.name}, {right.name})"
        joined = self.define(pair, left.dtype, (*left.shape, 2), bound)
        name, second = self.fresh(), self.fresh()
        self.emit(f"{name}, {second} = tl.split({joined.name})")
        self.values += [Value(n, left.dtype, left.shape, bound) for n in (name, second)]

    def dot(self) -> None:
        dtypes = ("float32", "int8", "float16")
        left = self.value(lambda v: v.dtype in dtypes and len(v.shape) == 2)
        left = left or self.load("float32", (self.pick(SIZES), self.pick(SIZES)))
        right = self.value(
            lambda v: v.dtype == left.dtype and len(v.shape) == 2 and v.shape[1] == left.shape[1]
        )
        left, right = self.small(left, 15), self.small(right or left, 15)
        shape = (left.shape[0], right.shape[0])
        out = "int32" if left.dtype == "int8" else "float32"
        acc = self.value(lambda v: v.dtype == out and v.shape == shape)
        acc = self.small(acc) if acc else None
        carried = f", {acc.name}" if acc else ""
        text = f"tl.dot({left.name}, tl.trans({right.name}){carried}, out_dtype=tl.{out})"
        bound = 225 * left.shape[1] + (acc.bound if acc else 0) if out == "float32" else 0
        self.define(text, out, shape, bound)

    def atomic(self) -> None:
        value = self.integer(self.shape())
        kind, place = self.pick(["add", "max", "xor"]), self.permuted(value.shape)
        name = f"{value.name} + 0"  # the interpreter's atomics take a view for what it views
        if self.number(0, 1):
            text = f"tl.atomic_{kind}(n_ptr + {place}, {name})"
            self.define(text, "int32", value.shape)
        else:  # several lanes at one address
            place = f"({self.index(value.shape)} % {self.number(1, 4)})"
            self.emit(f"tl.atomic_{kind}(n_ptr + {place}, {name})")

    def call(self) -> None:
        left = self.integer(self.tensor().shape)
        right = self.integer(left.shape)
        name, second = self.fresh(), self.fresh()
        self.emit(f"{name}, {second} = helper({left.name}, {right.name})")
        self.values += [Value(n, "int32", left.shape) for n in (name, second)]

    # blocks

    def block(self, statements: int) -> None:
        for _ in range(statements):
            self.statement()

    def carried(self) -> Value:
        """Copy a value into a variable that a block may assign again."""
        value = self.small(self.tensor(lambda v: v.dtype != "int1"))
        copy = Value(self.fresh("c"), value.dtype, value.shape, BOUND if value.is_float else 0)
        # + 0: Triton's front end takes two names of one value for one variable of a loop
        self.emit(f"{copy.name} = {value.name} + 0")
        return copy

    def successor(self, variable: Value) -> str:
        """Return an expression of the variable's type and shape."""
        other = self.value(
            lambda v: v.dtype == variable.dtype and v.shape == variable.shape and v != variable
        )
        if other is None:
            other = self.define(f"{variable.name} + 1", variable.dtype, variable.shape, BOUND + 1)
        elif self.number(1, 0, 1):
            text = f"{variable.name} + {other.name}"
            limit = EXACT.get(variable.dtype, 2**30) - BOUND
            if other.bound < limit:
                bound = variable.bound + other.bound
                other = self.define(text, variable.dtype, variable.shape, bound)
        return self.small(other).name

    def loop(self) -> None:
        variables = [self.carried() for _ in range(self.number(1, 2))]
        pointer, counter = self.fresh("p"), self.fresh("k")
        moving = self.number(0, 1)
        if moving:
            shape = (self.pick(SIZES),)
            start = self.index(shape)
            base = self.pick(["a_ptr", "b_ptr"])
            self.emit(f"{pointer} = {base} + {start}")
        before = list(self.values)
        self.values += variables
        self.emit(f"for {counter} in range({self.pick(['trips', 'odd', '2', 'pid + 1'])}):")
        self.depth += 1
        if moving:
            self.define(f"tl.load({pointer})", "float32", shape, BOUND)
        first = self.tensor(lambda v: v.dtype == "int32")
        if first.dtype == "int32":
            self.define(f"{first.name} + {counter}", "int32", first.shape)
        self.block(self.number(1, 2, 3))
        if moving and self.number(0, 1):
            value = self.value(lambda v: v.dtype == "float32" and v.shape == shape)
            self.emit(f"tl.store({pointer}, {self.small(value).name})")
        targets = ", ".join(v.name for v in variables)
        following = [self.successor(v) for v in variables]
        alike = len({(v.dtype, v.shape) for v in variables}) == 1 and len(variables) == 2
        if alike and self.number(0, 1):
            following[0] = variables[1].name  # they cross
        self.emit(f"{targets} = {', '.join(following)}")
        if moving:
            self.emit(f"{pointer} += {self.number(1, 8, 16)}")
        self.depth -= 1
        self.values = before + variables

    def branch(self) -> None:
        variable = self.carried()
        before = list(self.values)
        scalar = self.value(lambda v: v.dtype == "int32" and v.shape == ())
        if scalar is None:
            value = self.tensor(lambda v: v.dtype == "int32")
            if value.dtype != "int32":
                value = self.load("int32")
            scalar = self.define(f"tl.sum(tl.ravel({value.name}) & 7, 0) - 9", "int32", ())
        self.values.append(variable)
        inner = list(self.values)
        self.emit(f"if {scalar.name} {self.pick(['> 0', '% 3 == 1', '< odd'])}:")
        for other in range(self.number(1, 2)):
            if other:
                self.emit("else:")
                self.values = list(inner)
            self.depth += 1
            self.block(self.number(1, 2))
            self.emit(f"{variable.name} = {self.successor(variable)}")
            self.depth -= 1
        self.values = [*before, variable]

    def statement(self) -> None:
        kinds = [self.arithmetic, self.arithmetic, self.arithmetic, self.load, self.store]
        kinds += [self.store, self.reduce, self.reduce, self.scan, self.move, self.move]
        kinds += [self.compare, self.convert, self.dot, self.join, self.atomic, self.store_scalar]
        kinds += [self.call]
        if self.depth < 3:
            kinds += [self.loop, self.loop, self.branch]
        self.pick(kinds)()

    def text(self) -> str:
        lines = []
        shapes = set(self.indices)
        shapes |= {(size,) for shape in shapes for size in shape}
        for shape in sorted(shapes, key=len):
            name, m, n = "f" + "_".join(map(str, shape)), shape[0], shape[-1]
            text = (
                f"tl.arange(0, {n})" if len(shape) == 1 else f"f{m}[:, None] * {n} + f{n}[None, :]"
            )
            lines.append(f"    {name} = {text}")
        return HEADER + "\n".join([*lines, *self.lines]) + "\n"


def generate(pick: Callable[[Sequence[Any]], Any], statements: int) -> str:
    """Return the source of a module with a function ``kernel``."""
    program = Program(pick)
    program.load("int32", (16,))
    program.load("float32", (8, 16))
    program.block(statements)
    float_place = integer_place = 0
    for value in program.values[-24:]:
        flat = program.index(value.shape) if value.shape else "0"
        if value.is_float:
            program.emit(f"tl.store(fo_ptr + {float_place} + {flat}, {value.name})")
            float_place += value.numel
        else:
            program.emit(f"tl.store(io_ptr + {integer_place} + {flat}, {value.name})")
            integer_place += value.numel
    return program.text()
