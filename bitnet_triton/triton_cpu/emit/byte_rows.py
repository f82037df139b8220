"""int8 products row by row, through include/byte_rows.h: packed codes are unpacked on the way."""

from __future__ import annotations

from bitnet_triton.triton_cpu.analyse import in_seven_bits
from bitnet_triton.triton_cpu.emit.bytes import (
    BYTES,
    byte_expression,
    loads_below,
    of_zeros,
    prepare,
)
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.vector_products import VectorProduct
from bitnet_triton.triton_cpu.emit.views import View, corner
from bitnet_triton.triton_cpu.ir import Value

# Bytes of a row from which on it is read as a stream, and how far ahead that is fetched
_STREAM = 2048
_FETCH_AHEAD = 4096
_FETCH_FAR = 12288  # beyond that, into the second-level cache
_FETCH_STREAM = 1024  # of several streams at a time: less room for each


def kind(product: VectorProduct) -> str:
    """Return how bytes of the matrix meet those of the vectors: a type of the header."""
    if in_seven_bits(product.matrix):
        return "MatrixU7"
    return "VectorsU7" if in_seven_bits(product.vectors) else "BothSigned"


def emit_byte_rows(
    emitter: Emitter, group: list[VectorProduct], targets: list[str], *, lanes: bool
) -> None:
    """Emit products of several matrices with the same vectors, in one pass over the matrices.

    Args:
        emitter: writes the code.
        group: products of one ``kind``.
        targets: arrays of the sums of each.
        lanes: these are partial sums, sixteen for each result.
    """
    first = group[0]
    vectors = corner(emitter, first.vectors, 1 - first.along, BYTES)
    leaves: dict[Value, View] = {}
    # rows of the one load that are masked off add nothing if zeros are what becomes of its zeros
    loads = set().union(*(loads_below(emitter, product.matrix) for product in group))
    skipping = len(loads) == 1 and all(of_zeros(product.matrix) == 0 for product in group)
    rows: list[str] = []
    for product in group:
        where = rows if skipping else None
        prepare(emitter, product.matrix, product.along, leaves, vectors.length, where)
    height = f"shortest({', '.join([str(first.rows), *rows])})"
    sums = ", ".join(f"{{{target}}}" for target in targets)
    emitter.write(f"ByteSums<{'true' if lanes else 'false'}> const sums[] = {{{sums}}};")
    codes = emitter.fresh("codes")
    head = f"auto const {codes} = [&](int n, int64_t k, v64u8* w, auto fetch) TCPU_ALWAYS"
    with emitter.braces(head, end="};"):
        for leaf in leaves.values():
            _fetch(emitter, leaf, first.depth)
        for i, product in enumerate(group):
            code = byte_expression(emitter, product.matrix, product.along, leaves)
            emitter.write(f"w[{i}] = {code};")
    # as the result is laid out: [vectors, rows], or [rows, vectors]
    steps = f"1, {first.rows}" if first.along == 0 else f"{first.count}, 1"
    step = vectors.view.steps[first.along]
    emitter.write(
        f"byte_rows<{kind(first)}, {first.count}>"
        f"({{{vectors.view.base}, {step}, {vectors.length}}}, {vectors.count}, {height}, sums, "
        f"{steps}, {codes});"
    )


def _fetch(emitter: Emitter, view: View, depth: int) -> None:
    """Fetch early: a stretch of less than a page is nothing that the hardware sees coming."""
    row = f"{view.base} + n * int64_t({view.steps[0]}) + k"
    if depth < _STREAM:  # the next trip's stretch of the row
        emitter.write(f"__builtin_prefetch({row} + {depth});")
        return
    # further along the row: to the second level early, to the first in time
    with emitter.braces("if constexpr (decltype(fetch)::value == Fetch::streams)"):
        emitter.write(f"__builtin_prefetch({row} + {_FETCH_STREAM});")
    with emitter.braces("else"):
        emitter.write(f"__builtin_prefetch({row} + {_FETCH_FAR}, 0, 2);")
        emitter.write(f"__builtin_prefetch({row} + {_FETCH_AHEAD});")
