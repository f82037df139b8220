"""Products of a matrix with one vector or a few: no packing, one pass over the matrix.

Each output is a sum along memory. Sixteen lanes of partial sums an output are kept, over all
trips of a loop if the products only accumulate there, and added up once at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitnet_triton.triton_cpu.analyse import in_seven_bits
from bitnet_triton.triton_cpu.emit.bytes import BYTES, byte_expression, in_bytes, prepare
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.nest import Nest
from bitnet_triton.triton_cpu.emit.values import Buffer, Index, Lanes
from bitnet_triton.triton_cpu.emit.views import (
    View,
    address_step,
    is_memory,
    matrix_view,
    prefix_view,
    untransposed,
)
from bitnet_triton.triton_cpu.ir import Op, Value

if TYPE_CHECKING:
    from bitnet_triton.triton_cpu.emit.emitter import Emitter

LANES = 16
_MOST_VECTORS = 4
_ROWS = 4
# Bytes of a row from which on it is read as one stream, and how far ahead they are fetched
_LONG_ROW = 2048
_FETCH_AHEAD = 4096
_FETCH_FAR = 12288  # beyond that, into the second-level cache


@dataclass(frozen=True)
class VectorProduct:
    """A product seen as matrix [rows, depth] times vectors [count, depth].

    Attributes:
        matrix: the operand with many rows.
        vectors: the other one.
        along: dimension of ``matrix`` that is summed.
        count: number of vectors.
        rows: number of rows, a multiple of 16.
        depth: length of the sums.
    """

    op: Op
    matrix: Value
    vectors: Value
    along: int
    count: int
    rows: int
    depth: int


def vector_product(emitter: Emitter, op: Op) -> VectorProduct | None:
    """Return how a product is computed row by row; None if it is better packed."""
    a, b, _ = op.operands[:3]
    if a.type.rank != 2 or a.type.elem != b.type.elem:
        return None
    (m, k), n = a.type.shape or (0, 0), (b.type.shape or (0, 0))[1]
    few = VectorProduct(op, b, a, 0, m, n, k) if m <= n else VectorProduct(op, a, b, 1, n, m, k)
    if few.rows % _ROWS:
        return None
    result = op.results[0].type.elem
    if a.type.elem == "i8" and result == "i32":
        fits = few.count <= _MOST_VECTORS and k % BYTES == 0
        return few if fits and in_bytes(emitter, few.matrix, few.along) else None
    # Partial sums of several vectors lie one vector after the other: only as rows of the result
    fits = few.count == 1 or (few.count <= _MOST_VECTORS and few.along == 0)
    if a.type.elem in ("f32", "bf16", "f16") and result == "f32" and fits:
        root, order = untransposed(few.matrix)
        if is_memory(emitter, root) and address_step(emitter, root, order[few.along]) == 1:
            return few
    return None


def keeps_lanes(emitter: Emitter, argument: Value, yielded: Value) -> bool:
    """Tell whether a loop-carried value is only ever added to by products row by row."""
    value = argument
    while value is not yielded:
        if len(value.uses) != 1:
            return False
        use = value.uses[0]
        if use.name != "tt.dot" or use.operands[2] is not value or use.block is not yielded.block:
            return False
        if vector_product(emitter, use) is None:
            return False
        value = use.results[0]
    return value is not argument and len(value.uses) == 1


def open_lanes(emitter: Emitter, initial: Value) -> Lanes:
    """Declare partial sums, all zero, and what they will be added to."""
    n, c_elem = initial.type.size, c_type(initial.type)
    start = emitter.array(n, c_elem, "start")
    emitter.store_into(initial, start)
    return Lanes(_zero_lanes(emitter, n, c_elem), start)


def _zero_lanes(emitter: Emitter, n: int, c_elem: str) -> str:
    name = emitter.array(n * LANES, c_elem, "lanes")
    emitter.write(f"memset({name}, 0, sizeof({c_elem}) * {n * LANES});")
    return name


def emit_vector_products(emitter: Emitter, op: Op) -> None:
    """Emit ``op`` and the products after it that read the same vectors, in one pass.

    Planes of packed weights are one load and several products: together they read it once.
    """
    group = _group(emitter, op)
    targets = [_target(emitter, product) for product in group]
    with emitter.braces():
        if op.operands[0].type.elem == "i8":
            _int8_products(emitter, group, targets)
        else:
            vectors = _vector_array(emitter, group[0])
            for product, target in zip(group, targets):
                _float_product(emitter, product, target, vectors)
    for product, target in zip(group, targets):
        emitter.done.add(product.op)
        _hold(emitter, product, target)


def _group(emitter: Emitter, op: Op) -> list[VectorProduct]:
    first = vector_product(emitter, op)
    assert first is not None
    assert op.block is not None
    group = [first]
    for following in op.block.ops[op.index + 1 :]:
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
            f"{array}[({i}) * {product.depth} + {k}] = {emitter.element(value, index, nest)};"
        )

    emitter.loops(value.type.shape or (), body)
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


def _int8_products(emitter: Emitter, group: list[VectorProduct], targets: list[Lanes]) -> None:
    first = group[0]
    view, length = prefix_view(emitter, first.vectors, 1 - first.along, BYTES)
    vectors = [f"{view.base} + {v} * {view.steps[first.along]}" for v in range(first.count)]
    leaves: dict[Value, View] = {}
    for product in group:
        prepare(emitter, product.matrix, product.along, leaves, length)
    biased = [not in_seven_bits(p.matrix) and not in_seven_bits(p.vectors) for p in group]
    for v, vector in enumerate(vectors):
        if any(biased):
            emitter.write(f"int32_t const total{v} = sum_bytes({vector}, {length});")
    with emitter.braces(f"for (int n = 0; n < {first.rows}; ++n)"):
        _open_rows(emitter, group, targets, biased)
        with emitter.braces(f"for (int64_t k = 0; k < {length}; k += {BYTES})"):
            for leaf in leaves.values():
                ahead = _ahead(leaf, first)
                if first.depth >= _LONG_ROW:  # to the second level early, to the first in time
                    emitter.write(f"__builtin_prefetch({ahead} + {_FETCH_FAR}, 0, 2);")
                emitter.write(f"__builtin_prefetch({ahead});")
            for v, vector in enumerate(vectors):
                emitter.write(f"v64u8 const x{v} = load64({vector} + k);")
            for i, product in enumerate(group):
                code = byte_expression(emitter, product.matrix, product.along, leaves)
                emitter.write(f"v64u8 const w{i} = {code};")
                for v in range(first.count):
                    emitter.write(_multiply(product, i, v))
        for i, target in enumerate(targets):
            for v in range(first.count):
                emitter.write(f"store_lanes({_row(target, first, v)}, s{i}_{v});")


def _ahead(view: View, product: VectorProduct) -> str:
    """Return the address to fetch early: further along the row, or the next trip's stretch of it.

    The hardware sees long rows coming by itself, but not stretches of less than a page.
    """
    distance = product.depth if product.depth < _LONG_ROW else _FETCH_AHEAD
    return f"{view.base} + n * int64_t({view.steps[0]}) + k + {distance}"


def _row(target: Lanes, product: VectorProduct, v: int) -> str:
    """Return the address of the partial sums of row n and vector v, as the result is laid out."""
    place = f"{v * product.rows} + n" if product.along == 0 else f"n * {product.count} + {v}"
    return f"{target.name} + ({place}) * {LANES}"


def _open_rows(
    emitter: Emitter, group: list[VectorProduct], targets: list[Lanes], biased: list[bool]
) -> None:
    for i, (product, target) in enumerate(zip(group, targets)):
        for v in range(product.count):
            # dot4 multiplies unsigned by signed: bytes biased by 128 are taken back here
            bias = f", -128 * total{v}" if biased[i] else ""
            emitter.write(f"v16i32 s{i}_{v} = load_lanes({_row(target, product, v)}{bias});")


def _multiply(product: VectorProduct, i: int, v: int) -> str:
    """Return the statement that adds products of bytes: the unsigned operand comes first."""
    if in_seven_bits(product.matrix):
        return f"dot4_u7(s{i}_{v}, w{i}, x{v});"
    if in_seven_bits(product.vectors):
        return f"dot4_u7(s{i}_{v}, x{v}, w{i});"
    return f"dot4(s{i}_{v}, flip64(w{i}), x{v});"
