"""Whether a value is inlined where it is read, or written to an array once."""

from __future__ import annotations

from bitnet_triton.triton_cpu.analyse import INDEXING
from bitnet_triton.triton_cpu.emit import scalar
from bitnet_triton.triton_cpu.emit.arrays import materialise
from bitnet_triton.triton_cpu.emit.elements import ELEMENTS
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.masks import may_hold_everywhere
from bitnet_triton.triton_cpu.emit.order import inlined
from bitnet_triton.triton_cpu.emit.strides import stride
from bitnet_triton.triton_cpu.emit.vector_products import vector_product
from bitnet_triton.triton_cpu.emit.views import is_memory, untransposed
from bitnet_triton.triton_cpu.ir import Op, Value

_PER_ELEMENT = ("arith.", "math.", "tt.fp_to_fp", "tt.bitcast", "tt.extern_elementwise")

_WIDEN_F16 = 8  # compilers do it bit by bit where they vectorise


def defer(emitter: Emitter, op: Op) -> None:
    """Leave an elementwise operation to the nests that read it, unless that is wasteful."""
    if op.name not in ELEMENTS:
        # Find out now, while the operation's line is known, whether C++ can say it
        scalar.expression(op, ["x"] * len(op.operands), wraps=True)
    for result in op.results:
        if op.name == "tt.broadcast":
            # what is repeated, not its repetitions
            source = op.operands[0]
            if _is_dear_to_repeat(emitter, source) or _should_write_out(emitter, result):
                materialise(emitter, source)
            elif _must_wait(emitter, result):
                emitter.pending.append(result)
        elif _should_write_out(emitter, result):
            materialise(emitter, result)
        elif _must_wait(emitter, result):
            emitter.pending.append(result)


def _should_write_out(emitter: Emitter, value: Value) -> bool:
    """Tell whether computing ``value`` in every nest that reads it would be wasteful."""
    return value.type.size > 1 and _is_dear(emitter, value) and _read_twice(emitter, value)


def _must_wait(emitter: Emitter, value: Value) -> bool:
    """Tell whether a deferred value has to be watched: it reads memory, or costs something."""
    return lazy_cost(emitter, value)[1] or _is_dear(emitter, value)


def _is_dear(emitter: Emitter, value: Value) -> bool:
    """Tell whether ``value`` is better computed once; of an index that is true if it is loaded.

    Compilers compute addresses and masks from the indices of a loop; they could not read them from
    an array and still see what lies side by side.
    """
    is_index = value.type.pointer or value.type.elem == "i1" or emitter.is_address(value)
    price, loads = lazy_cost(emitter, value)
    return price >= scalar.EXPENSIVE and (loads or not is_index)


def _is_dear_to_repeat(emitter: Emitter, value: Value) -> bool:
    """Tell whether a broadcast of ``value`` would compute something dear again and again."""
    widened = sum(_WIDEN_F16 for op in inlined(emitter, value) if _widens_f16(op))
    return lazy_cost(emitter, value)[0] + widened > 2 * scalar.LOAD_COST


def _widens_f16(op: Op) -> bool:
    return op.name == "arith.extf" and op.operands[0].type.elem == "f16"


def lazy_cost(emitter: Emitter, value: Value) -> tuple[int, bool]:
    """Return what an element costs where it is inlined, and whether that reads memory."""
    price, loads = 0, False
    for op in inlined(emitter, value):
        price += 0 if op.name in INDEXING else _cost(emitter, op)
        loads = loads or op.name == "tt.load"
    return price, loads


def _cost(emitter: Emitter, op: Op) -> int:
    """Return what an element costs; what lies side by side in memory is as good as an array."""
    if op.name == "tt.load" and is_memory(emitter, op.results[0]):
        address, *mask = op.operands
        in_rows = 1 in [stride(emitter, address, dim) for dim in range(address.type.rank)]
        if in_rows and (not mask or may_hold_everywhere(emitter, mask[0])):
            return 1
    return scalar.cost(op)


def _read_twice(emitter: Emitter, value: Value) -> bool:
    """Tell whether ``value`` ends up in two nests, each of which would compute it anew."""
    roots = _roots(value)
    products = [root for root in roots if root.name == "tt.dot"]
    if products and len(products) == len(roots):
        return len(value.uses) > 1 and not _share(emitter, value, products)
    return len(roots) > 1 or (len(value.uses) > 1 and bool(products))


def _roots(value: Value) -> set[Op]:
    """Return the operations that end the elementwise expressions ``value`` is part of."""
    roots: set[Op] = set()
    seen: set[Op] = set()
    work = list(value.uses)
    while work:
        use = work.pop()
        if use in seen:
            continue
        seen.add(use)
        elementwise = use.name.startswith(_PER_ELEMENT) and use.results[0].is_block
        if elementwise and use.block is value.block:
            work.extend(use.results[0].uses)
        else:
            roots.add(use)
    return roots


def _share(emitter: Emitter, value: Value, products: list[Op]) -> bool:
    """Tell whether products can read ``value`` as it is, all of them in one pass or packed."""
    if all(vector_product(emitter, product) for product in products):
        return True
    return all(untransposed(emitter, product.operands[1])[0] is value for product in products)
