"""Random Triton kernels whose results are the same in every order of evaluation.

Integers wrap, and floats hold integers small enough that no operation rounds: sums may be added in
any order and products contracted, and still every run agrees to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fuzz_values import BOUND, EXACT, HEADER, SIZES, Value, Writer


class Program(Writer):
    """Writes statements."""

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
                (f"{a} * 3 - {b}", left.bound * 3 + right.bound),
            ]
            forms = [form for form in forms if form[1] < limit]
            text, bound = self.pick(forms)
            self.define(text, left.dtype, shape, bound)
            return
        forms = [
            *(f"{a} + {b}", f"{a} - {b}", f"{a} * {b}", f"{a} ^ {b}", f"{a} & {b}", f"{a} | {b}"),
            *(f"{a} // (({b} & 7) + 1)", f"{a} % (({b} & 7) + 1)", f"{a} << ({b} & 7)"),
            *(f"{a} >> ({b} & 7)", f"tl.where({a} < {b}, {a}, {b} - 1)", f"tl.minimum({a}, {b})"),
            *(f"-{a} + {b}", f"tl.abs({a}) + {b}", f"{a} * 37 + {b}"),
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

    def order(self) -> None:
        value = self.tensor(lambda v: v.dtype in ("int32", "float32", "int64") and v.shape[-1] > 1)
        *rest, size = value.shape
        if size == 1 or value.dtype not in ("int32", "float32", "int64"):
            return
        kind = self.pick(["sort", "sort", "topk", "histogram"])
        if kind == "sort":
            down = self.pick(["", ", descending=True"])
            text = f"tl.sort({value.name}{down})"
            self.define(text, value.dtype, value.shape, value.bound)
        elif kind == "topk" and size > 2:
            text = f"tl.topk({value.name}, {size // 2})"
            self.define(text, value.dtype, (*rest, size // 2), value.bound)
        else:
            whole = self.integer(value.shape)
            text = f"tl.histogram(tl.reshape({whole.name} & 7, ({whole.numel},)), 8)"
            self.define(text, "int32", (8,))

    def gather(self) -> None:
        value = self.tensor(lambda v: v.dtype != "int1")
        axis = self.number(*range(len(value.shape)))
        index = self.integer(value.shape)
        text = f"tl.gather({value.name}, {index.name} & {value.shape[axis] - 1}, {axis})"
        self.define(text, value.dtype, value.shape, value.bound)

    def cube(self) -> None:
        value = self.tensor(lambda v: v.dtype in ("int32", "float32") and v.numel >= 8)
        if value.dtype not in ("int32", "float32") or value.numel < 8:
            return
        value, side = self.small(value), value.numel // 4
        cube = f"tl.reshape({value.name}, (2, {side}, 2))"
        kind = self.pick(["permute", "sum", "max", "cumsum"])
        if kind == "permute":
            order = self.pick(["2, 0, 1", "1, 0, 2", "2, 1, 0", "1, 2, 0"])
            text = f"tl.reshape(tl.permute({cube}, {order}), {value.shape})"
            self.define(text, value.dtype, value.shape, value.bound)
        elif kind == "cumsum":
            text = f"tl.reshape(tl.cumsum({cube}, 1), {value.shape})"
            self.define(text, value.dtype, value.shape, value.bound * side)
        else:
            axis = self.number(0, 1, 2)
            shape = tuple(n for k, n in enumerate((2, side, 2)) if k != axis)
            self.define(f"tl.{kind}({cube}, {axis})", value.dtype, shape, value.bound * side)

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

    def scalar(self) -> Value:
        """Return an int32."""
        found = self.value(lambda v: v.dtype == "int32" and v.shape == ())
        if found is not None:
            return found
        value = self.integer(self.shape())
        return self.define(f"tl.sum(tl.ravel({value.name}) & 7, 0) - 9", "int32", ())

    def while_loop(self) -> None:
        variable, counter = self.carried(), self.fresh("w")
        self.emit(f"{counter} = {self.scalar().name} & 7")
        before = list(self.values)
        self.values.append(variable)
        self.emit(f"while {counter} > 0:")
        self.depth += 1
        self.block(self.number(1, 2))
        self.emit(f"{variable.name} = {self.successor(variable)}")
        self.emit(f"{counter} = {counter} - {self.number(2, 3)}")
        self.depth -= 1
        self.values = [*before, variable]

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
        scalar = self.scalar()
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
        kinds += [self.call, self.order, self.gather, self.cube]
        if self.depth < 3:
            kinds += [self.loop, self.loop, self.branch, self.while_loop]
        self.pick(kinds)()

    def text(self) -> str:
        shapes = set(self.indices)
        sizes = sorted({size for shape in shapes for size in shape})
        lines = [f"    f{n} = tl.arange(0, {n})" for n in sizes]
        for m, n in sorted(shape for shape in shapes if len(shape) == 2):
            lines.append(f"    f{m}_{n} = f{m}[:, None] * {n} + f{n}[None, :]")
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
