"""Elementwise operations as C++ expressions over scalars."""

from __future__ import annotations

from bitnet_triton.triton_cpu.emit.ctypes import BITS, c_type, unsigned, wrapping
from bitnet_triton.triton_cpu.ir import Op, Type
from bitnet_triton.triton_cpu.libdevice import SYMBOLS

_FLOAT_BINARY = {"addf": "+", "subf": "-", "mulf": "*", "divf": "/"}
_INTEGER_BINARY = {"addi": "+", "subi": "-", "muli": "*"}
_BITWISE = {"andi": "&", "ori": "|", "xori": "^"}
_DIVISIONS = {
    "divsi": "div_signed", "remsi": "rem_signed", "divui": "div_unsigned", "remui": "rem_unsigned",
    "ceildivsi": "ceildiv_signed", "floordivsi": "floordiv_signed",
}  # fmt: skip
_SHIFTS = {"shli": "shift_left", "shrui": "shift_right_unsigned", "shrsi": "shift_right_signed"}
_EXTREMES = {"maxsi": ">", "minsi": "<", "maxui": ">", "minui": "<"}
_FLOAT_EXTREMES = {
    "maxnumf": "m_maxnum", "minnumf": "m_minnum", "maximumf": "m_maximum", "minimumf": "m_minimum",
}  # fmt: skip
_INTEGER_COMPARES = ("==", "!=", "<", "<=", ">", ">=", "<", "<=", ">", ">=")
# arith.cmpf: ordered comparisons are false on NaN, unordered ones (8 to 14) true
_FLOAT_COMPARES = (
    "false", "{a} == {b}", "{a} > {b}", "{a} >= {b}", "{a} < {b}", "{a} <= {b}",
    "({a} < {b} || {a} > {b})", "({a} == {a} && {b} == {b})", "!({a} < {b} || {a} > {b})",
    "!({a} <= {b})", "!({a} < {b})", "!({a} >= {b})", "!({a} > {b})", "{a} != {b}",
    "({a} != {a} || {b} != {b})", "true",
)  # fmt: skip
# C++ name and cost, in units of an addition
_MATH = {
    "exp": ("m_exp", 10), "exp2": ("m_exp2", 10), "log": ("m_log", 12), "log2": ("m_log2", 12),
    "sqrt": ("m_sqrt", 6), "rsqrt": ("m_rsqrt", 8), "absf": ("m_abs", 1), "absi": ("m_absi", 1),
    "floor": ("m_floor", 1), "ceil": ("m_ceil", 1), "sin": ("m_sin", 20), "cos": ("m_cos", 20),
    "erf": ("m_erf", 20), "tanh": ("m_tanh", 20), "fma": ("m_fma", 1),
}  # fmt: skip
_CONVERSIONS = frozenset(
    {"sitofp", "uitofp", "fptosi", "fptoui", "extf", "truncf", "index_cast", "index_castui"}
)
LOAD_COST = 4
EXPENSIVE = 4


def cost(op: Op) -> int:
    """Return roughly what one element costs, in units of an addition."""
    dialect, _, name = op.name.partition(".")
    if op.name == "tt.load":
        return LOAD_COST
    if dialect == "math":
        return _MATH.get(name, ("", 10))[1]
    if op.name == "tt.extern_elementwise":
        return 20
    if name in _DIVISIONS or name in ("divf", "remf", "precise_divf", "precise_sqrt"):
        return 4
    return 1


def simplified(op: Op, a: list[str]) -> str | None:
    """Return the operand that the result is, where a condition among the operands is known."""
    if op.name == "arith.select" and a[0] in ("true", "false"):
        return a[1] if a[0] == "true" else a[2]
    if op.name not in ("arith.andi", "arith.ori"):
        return None
    neutral, final = ("true", "false") if op.name == "arith.andi" else ("false", "true")
    if final in a:
        return final
    return next((a[1 - place] for place in (0, 1) if a[place] == neutral), None)


def expression(op: Op, a: list[str], wraps: bool) -> str:
    """Return the C++ expression of an elementwise operation.

    Args:
        op: the operation; operand and result types are read from it.
        a: C++ expressions of the operands, each evaluated more than once at no cost.
        wraps: integers wrap around; otherwise overflow is excluded (addresses).

    Raises:
        UnsupportedOperation: no C++ stands for it.
    """
    dialect, _, name = op.name.partition(".")
    inputs = [value.type for value in op.operands]
    output = op.results[0].type
    found = None
    if dialect == "arith":
        found = _arith(op, name, a, inputs, output, wraps)
    elif dialect == "math" and name in _MATH:
        found = f"{_MATH[name][0]}({', '.join(_widened(x, t) for x, t in zip(a, inputs))})"
    elif dialect == "tt":
        found = _triton(op, name, a, inputs, output)
    if found is None:
        raise op.unsupported()
    return found if output.pointer or found.startswith("(") else f"{c_type(output)}({found})"


def _widened(a: str, type_: Type) -> str:
    """Half-precision arguments of a mathematical function are computed in float."""
    return f"float({a})" if type_.elem in ("f16", "bf16") else a


def _arith(
    op: Op, name: str, a: list[str], inputs: list[Type], output: Type, wraps: bool
) -> str | None:
    elem = output.elem
    if name in _FLOAT_BINARY:
        return f"{a[0]} {_FLOAT_BINARY[name]} {a[1]}"
    if name in _FLOAT_EXTREMES:
        return f"{_FLOAT_EXTREMES[name]}({_widened(a[0], output)}, {_widened(a[1], output)})"
    if name == "negf":
        return f"-{a[0]}"
    if name == "remf":
        return f"m_fmod({_widened(a[0], output)}, {_widened(a[1], output)})"
    if name == "select":
        return f"({a[0]} ? {a[1]} : {a[2]})"
    if name == "cmpf":
        return f"({_FLOAT_COMPARES[op.integer('predicate')].format(a=a[0], b=a[1])})"
    if name == "cmpi":
        return _compare(op.integer("predicate"), a, inputs[0])
    if name in _BITWISE:
        return f"{a[0]} {_BITWISE[name]} {a[1]}"
    if elem in BITS and inputs[0].elem in BITS:
        return _integer(name, a, inputs[0].elem, elem, wraps)
    return _conversion(name, a[0], inputs[0].elem, output)


def _compare(predicate: int, a: list[str], type_: Type) -> str:
    sign = _INTEGER_COMPARES[predicate]
    if predicate < 6 or type_.pointer:
        return f"({a[0]} {sign} {a[1]})"
    cast = unsigned(type_.elem)
    return f"({cast}({a[0]}) {sign} {cast}({a[1]}))"


def _integer(name: str, a: list[str], source: str, elem: str, wraps: bool) -> str | None:
    if name in _INTEGER_BINARY:
        sign = _INTEGER_BINARY[name]
        if elem == "i1":
            return f"(int({a[0]}) {sign} int({a[1]})) & 1"
        if not wraps:
            return f"{a[0]} {sign} {a[1]}"
        wide = wrapping(elem)
        return f"{wide}({a[0]}) {sign} {wide}({a[1]})"
    if name in _DIVISIONS:
        return f"{_DIVISIONS[name]}({a[0]}, {a[1]})"
    if name in _SHIFTS:
        return f"{_SHIFTS[name]}({a[0]}, {a[1]})"
    if name in _EXTREMES:
        x, y = a if name.endswith("si") else [f"{unsigned(elem)}({v})" for v in a]
        return f"({x} {_EXTREMES[name]} {y} ? {a[0]} : {a[1]})"
    if name == "extui":
        return f"{unsigned(source)}({a[0]})"
    if name == "extsi":
        # A set bit of i1 is -1
        return f"-int({a[0]})" if source == "i1" else a[0]
    if name == "trunci":
        return f"({a[0]} & 1) != 0" if elem == "i1" else a[0]
    if name in ("bitcast", "index_cast", "index_castui"):
        return a[0]
    return None


def _conversion(name: str, a: str, source: str, output: Type) -> str | None:
    target = c_type(output)
    if name == "bitcast":
        return f"bitcast<{target}>({a})"
    if name not in _CONVERSIONS:
        return None
    if name == "fptoui":
        return f"convert<{unsigned(output.elem)}>({a})"
    if name == "uitofp":
        return f"convert<{target}>({unsigned(source)}({a}))"
    if name == "sitofp" and source == "i1":
        return f"-int({a})"
    return f"convert<{target}>({a})"


def _triton(op: Op, name: str, a: list[str], inputs: list[Type], output: Type) -> str | None:
    if name == "addptr":
        return f"({a[0]} + {a[1]})"
    if name in ("fp_to_fp", "bitcast", "int_to_ptr", "ptr_to_int"):
        return _triton_conversion(op, name, a[0], output)
    if name == "precise_sqrt":
        return f"m_sqrt_rn({a[0]})"
    if name == "precise_divf":
        return f"m_div_rn({a[0]}, {a[1]})"
    if name == "clampf":
        propagates = "true" if op.integer("propagateNan") else "false"
        x, low, high = (_widened(v, t) for v, t in zip(a, inputs))
        return f"m_clamp({x}, {low}, {high}, {propagates})"
    if name == "mulhiui":
        return f"m_mulhiui({a[0]}, {a[1]})"
    return _library_call(op, a) if name == "extern_elementwise" else None


def _triton_conversion(op: Op, name: str, a: str, output: Type) -> str:
    target = c_type(output)
    if name == "fp_to_fp":
        towards_zero = op.attributes.get("rounding", "1").startswith("0")
        return f"truncate_to<{target}>(float({a}))" if towards_zero else f"convert<{target}>({a})"
    if name == "bitcast" and not output.pointer:
        return f"bitcast<{target}>({a})"
    return f"(({target})({a}))"


def _library_call(op: Op, a: list[str]) -> str:
    symbol = op.attributes["symbol"].strip('"')
    if symbol not in SYMBOLS:
        raise op.unsupported(f"the library function `{symbol}` has no CPU form")
    return f"{SYMBOLS[symbol]}({', '.join(a)})"
