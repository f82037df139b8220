"""Products of a matrix with one vector or a few: no packing, one pass over the matrix.

Each output is a sum along memory. Sixteen lanes of partial sums an output are kept, over all
trips of a loop if the products only accumulate there, and added up once at the end. Where a row of
bytes is long, its sums are added up at once: they would only take room in the caches.
"""

from __future__ import annotations

from bitnet_triton.triton_cpu.analyse import may_write
from bitnet_triton.triton_cpu.emit.accumulate import accumulator, finish
from bitnet_triton.triton_cpu.emit.arrays import store_into
from bitnet_triton.triton_cpu.emit.byte_rows import emit_byte_rows, kind
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.elements import element
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.fetches import woven
from bitnet_triton.triton_cpu.emit.loops import write_loops
from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.emit.values import Buffer, Lanes
from bitnet_triton.triton_cpu.emit.vector_products import VectorProduct, adds_up, vector_product
from bitnet_triton.triton_cpu.emit.views import listed_rows, matrix_view, untransposed
from bitnet_triton.triton_cpu.ir import Op, Value

LANES = 16


def keeps_lanes(emitter: Emitter, argument: Value, yielded: Value) -> bool:
    """Tell whether a loop-carried value is only ever added to by products row by row."""
    value = argument
    while value is not yielded:
        if len(value.uses) != 1:
            return False
        use = value.uses[0]
        if use.name != "tt.dot" or use.operands[2] is not value or use.block is not yielded.block:
            return False
        product = vector_product(emitter, use)
        if product is None or product.is_listed or adds_up(product) or _may_be_written_out(use):
            return False
        value = use.results[0]
    return value is not argument and len(value.uses) == 1


def _may_be_written_out(product: Op) -> bool:
    """Tell whether the body of a loop stores something before a product: its operands may wait."""
    assert product.block is not None
    return may_write(product.block.ops[: product.index])


def open_lanes(emitter: Emitter, initial: Value) -> Lanes:
    """Declare partial sums, all zero, and what they will be added to."""
    n, c_elem = initial.type.size, c_type(initial.type)
    start = emitter.array(n, c_elem, "start")
    store_into(emitter, initial, start)
    return Lanes(_zero_lanes(emitter, n, c_elem), start)


def _zero_lanes(emitter: Emitter, n: int, c_elem: str) -> str:
    name = emitter.array(n * LANES, c_elem, "lanes")
    emitter.write(f"memset({name}, 0, sizeof({c_elem}) * {n * LANES});")
    return name


def emit_vector_products(emitter: Emitter, op: Op) -> None:
    """Emit ``op`` and the products after it that read the same vectors, in one pass.

    Planes of packed weights are one load and several products: together they read it once.
    """
    product = vector_product(emitter, op)
    assert product is not None
    if op.operands[0].type.elem != "i8" and not isinstance(emitter.held.get(op.operands[2]), Lanes):
        _emit_rows(emitter, product)
        return
    group = _group(emitter, product)
    if adds_up(product):
        _emit_long_rows(emitter, group)
        return
    targets = [_target(emitter, product) for product in group]
    with emitter.braces():
        if op.operands[0].type.elem == "i8":
            emit_byte_rows(emitter, group, [target.name for target in targets], lanes=True)
        else:
            vectors = _vector_array(emitter, group[0])
            for product, target in zip(group, targets):
                _float_product(emitter, product, target, vectors)
    for product, target in zip(group, targets):
        emitter.done.add(product.op)
        _hold(emitter, product, target)


def _emit_long_rows(emitter: Emitter, group: list[VectorProduct]) -> None:
    sums = [accumulator(emitter, product.op) for product in group]
    with emitter.braces():
        emit_byte_rows(emitter, group, [name for name, _ in sums], lanes=False)
    for product, (name, c_sum) in zip(group, sums):
        emitter.done.add(product.op)
        finish(emitter, product.op, name, c_sum)


def _emit_rows(emitter: Emitter, product: VectorProduct) -> None:
    """Emit a product of floats that no loop adds to: its sums are complete."""
    name, c_sum = accumulator(emitter, product.op)
    with emitter.braces():
        vectors = matrix_view(emitter, product.vectors, unit=1 - product.along)
        step = vectors.steps[product.along]
        shape = f"{product.count}, {product.rows}, {product.depth}"
        if product.is_listed:
            root, order = untransposed(emitter, product.matrix)
            listed = listed_rows(emitter, root, order[product.along])
            emitter.write(f"dot_listed<{shape}>({vectors.base}, {step}, {listed}, {name});")
        else:
            rows = matrix_view(emitter, product.matrix, unit=product.along)
            views = f"{vectors.base}, {step}, {rows.base}, {rows.steps[1 - product.along]}"
            fetch = woven(emitter, product.op, product.rows, product.depth, product.matrix.type)
            emitter.write(f"dot_rows<{shape}>({views}, {name}{fetch});")
    finish(emitter, product.op, name, c_sum)


def _group(emitter: Emitter, first: VectorProduct) -> list[VectorProduct]:
    assert first.op.block is not None
    group = [first]
    for following in first.op.block.ops[first.op.index + 1 :]:
        if following.name != "tt.dot":
            if following.regions or not following.results or following.name in _BARRIERS:
                break
            continue
        product = vector_product(emitter, following)
        if product is None or not _belongs(emitter, product, group):
            break
        group.append(product)
    return group


_BARRIERS = frozenset(
    {"tt.atomic_rmw", "tt.atomic_cas", "tt.atomic_load", "tt.atomic_poll", "tt.call"}
)


def _belongs(emitter: Emitter, product: VectorProduct, group: list[VectorProduct]) -> bool:
    first = group[0]
    shape = (product.vectors, product.along, product.rows, product.depth)
    if shape != (first.vectors, first.along, first.rows, first.depth):
        return False
    if product.matrix.type.elem == "i8" and kind(product) != kind(first):
        return False
    # What it starts from must be known by now: a carried value, a constant or an earlier sum
    start = product.op.operands[2]
    return start in emitter.held or _is_constant(start)


def _is_constant(value: Value) -> bool:
    op = value.op
    return op is not None and op.name == "arith.constant"


def _target(emitter: Emitter, product: VectorProduct) -> Lanes:
    held = emitter.held.get(product.op.operands[2])
    if isinstance(held, Lanes):
        return held
    return open_lanes(emitter, product.op.operands[2])


def _hold(emitter: Emitter, product: VectorProduct, target: Lanes) -> None:
    """Pass open lanes on through the loop; fold those that were opened here."""
    result = product.op.results[0]
    if isinstance(emitter.held.get(product.op.operands[2]), Lanes):
        emitter.held[result] = target
        return
    emitter.write(f"fold_lanes<{result.type.size}>({target.name}, {target.start});")
    emitter.held[result] = Buffer(target.start, emitter.block)


def _vector_array(emitter: Emitter, product: VectorProduct) -> str:
    """Return the address of the vectors [count, depth], contiguous."""
    value, depth_dim = product.vectors, 1 - product.along
    if product.count == 1:
        return matrix_view(emitter, value, unit=depth_dim).base
    array = emitter.array(value.type.size, c_type(value.type), "vectors")

    def body(nest: Nest, index: Index) -> None:
        i, k = (index[1 - depth_dim], index[depth_dim])
        nest.statement(
            f"{array}[({i}) * {product.depth} + {k}] = {element(emitter, value, index, nest)};"
        )

    write_loops(emitter, value.type.shape or (), body)
    return array


def _float_product(emitter: Emitter, product: VectorProduct, target: Lanes, vectors: str) -> None:
    view = matrix_view(emitter, product.matrix, unit=product.along)
    step = view.steps[1 - product.along]
    shape = f"{product.rows}, {product.depth}"
    for v in range(product.count):
        vector, lanes = (
            f"{vectors} + {v * product.depth}",
            f"{target.name} + {v * product.rows * LANES}",
        )
        emitter.write(f"dot_lanes<{shape}>({vector}, {view.base}, {step}, {lanes});")
