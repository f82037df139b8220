"""Library functions of Triton that are not inlined but lowered to a routine of our own.

``tl.sort`` and ``tl.topk`` both call ``sort_impl``, which unrolls into a bitonic network of
hypercube reshapes: hundreds of loops for the C++ compiler. ``mark`` keeps the calls of it whole
through the inliner, and ``lookup`` says what such a call computes. All that is known of a call
stands in the callee's mangled name; whatever does not read as expected stays unmarked, is
inlined as usual and merely compiles slowly.

The mangled names::

    3.7 to 3.9  triton.language.standard.sort_impl__fp32S2_64S_c4_cNone_cTrue
    3.6         triton.language.standard.sort_impl__fp32S2_64S__(1,)cconstexpr_4__(2,)cNone_(3,)c...
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from triton._C.libtriton import ir
from triton.language import standard

# sort_impl's parameters; in another order or number they mean something that we do not know
_PARAMETERS = ["x", "k", "dim", "descending"]
_PREFIX = f"{standard.__name__}.sort_impl__"

# Mangled element types that sort.h orders, and how MLIR spells them. No i1: signed, so that true
# is less than false, which no C++ type does.
_ELEMENTS = {f"{sign}{bits}": f"i{bits}" for sign in "iu" for bits in (8, 16, 32, 64)}
_ELEMENTS |= {"fp16": "f16", "bf16": "bf16", "fp32": "f32", "fp64": "f64"}

_TENSOR = rf"(?P<element>{'|'.join(_ELEMENTS)})S(?P<shape>\d+(?:_\d+)*)S"
_VALUE = r"(?:None|True|False|\d+)"
_VALUE_3_6 = rf"(?:{_VALUE}|constexpr_{_VALUE}_)"
_SIGNATURE = re.compile(rf"{_TENSOR}_c(?P<k>{_VALUE})_c(?P<dim>{_VALUE})_c(?P<descending>{_VALUE})")
_SIGNATURE_3_6 = re.compile(
    rf"{_TENSOR}__\(1,\)c(?P<k>{_VALUE_3_6})_\(2,\)c(?P<dim>{_VALUE_3_6})"
    rf"_\(3,\)c(?P<descending>{_VALUE_3_6})"
)
_CONSTANTS = {"None": None, "False": 0, "True": 1}


@dataclass(frozen=True)
class NativeCall:
    """What a call of a marked function computes from its one operand, a tensor.

    Attributes:
        kind: all values in order, or the first ``k`` of them in order.
        axis: the dimension along which to sort; so far always the last one.
        descending: largest first; ``topk`` then keeps the largest, otherwise the smallest.
        k: how many values ``topk`` keeps, a power of two; None for ``sort``.
        unsigned: the elements are unsigned integers, which the tensor's type does not tell.
    """

    kind: Literal["sort", "topk"]
    axis: int
    descending: bool
    k: int | None
    unsigned: bool = False


def mark(module: Any) -> None:
    """Keep the inliner from the functions in ``module`` that ``lookup`` knows.

    Args:
        module: the ``ir.module`` that Triton's front end made, before any pass.
    """
    if getattr(getattr(standard, "sort_impl", None), "arg_names", None) != _PARAMETERS:
        return
    names = set()

    def visit(operation: Any) -> None:
        if operation.get_name() == "tt.call":
            name = operation.get_flat_symbol_ref_attr("callee")
            types = _types(name)
            if types is not None and types == _types_of(operation):
                names.add(name)

    module.walk(visit)
    true = ir.builder(module.context).get_bool_attr(True)
    for name in names:
        module.get_function(name).set_attr("noinline", true)


def lookup(callee: str) -> NativeCall | None:
    """Say what the function named ``callee`` computes, or None if it is not one of ours.

    Args:
        callee: the symbol's name, bare or as MLIR prints it (``@name``, ``@"name"``).
    """
    parsed = _parse(callee.removeprefix("@").strip('"'))
    return parsed[0] if parsed else None


@lru_cache(maxsize=256)
def _parse(name: str) -> tuple[NativeCall, list[int], str] | None:
    """Read the call, the operand's shape and the mangled element type from a mangled name."""
    if not name.startswith(_PREFIX):
        return None
    signature = name[len(_PREFIX) :]
    match = _SIGNATURE.fullmatch(signature) or _SIGNATURE_3_6.fullmatch(signature)
    if match is None:
        return None
    shape = [int(size) for size in match["shape"].split("_")]
    k, dim, descending = (_constant(match[group]) for group in ("k", "dim", "descending"))
    last = len(shape) - 1
    if dim not in (None, last) or descending not in (0, 1):
        return None
    if k is not None:
        if not 1 <= k <= shape[last]:
            return None
        k = 1 << (k.bit_length() - 1)  # as sort_impl rounds it where it does not refuse it
    unsigned = match["element"].startswith("u")
    call = NativeCall("sort" if k is None else "topk", last, bool(descending), k, unsigned)
    return call, shape, match["element"]


def _constant(text: str) -> int | None:
    text = text.removeprefix("constexpr_").removesuffix("_")
    return _CONSTANTS[text] if text in _CONSTANTS else int(text)


def _types(name: str) -> tuple[list[str], list[str]] | None:
    """Types of operands and results that a call of the function called ``name`` should have."""
    parsed = _parse(name)
    if parsed is None:
        return None
    call, shape, element = parsed
    result = shape if call.k is None else [*shape[:-1], call.k]
    operand_type, result_type = (
        f"tensor<{'x'.join(map(str, sizes))}x{_ELEMENTS[element]}>" for sizes in (shape, result)
    )
    return [operand_type], [result_type]


def _types_of(operation: Any) -> tuple[list[str], list[str]]:
    operands = [operation.get_operand(i) for i in range(operation.get_num_operands())]
    results = [operation.get_result(i) for i in range(operation.get_num_results())]
    return [str(v.get_type()) for v in operands], [str(v.get_type()) for v in results]
