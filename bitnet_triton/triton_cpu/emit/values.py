"""How the emitted code holds a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bitnet_triton.triton_cpu.emit.nest import Index, Nest
from bitnet_triton.triton_cpu.ir import Block


@dataclass(frozen=True)
class Scalar:
    """A C++ expression without side effects."""

    code: str


@dataclass(frozen=True)
class Buffer:
    """An array in row-major order.

    Attributes:
        name: of the array.
        owner: the block that may overwrite it once its value is dead; None for nobody.
    """

    name: str
    owner: Block | None = None


@dataclass(frozen=True)
class Lazy:
    """A function of the index, inlined where the value is read.

    Attributes:
        element: writes what it needs into the nest, returns the element's expression.
        stride: the step of an integer or pointer along a dimension, None when unknown.
        linear: whether the value is linear in the index of a dimension.
    """

    element: Callable[[Index, Nest], str]
    stride: Callable[[int], int | None] = lambda _: None
    linear: Callable[[int], bool] = lambda _: False


@dataclass(frozen=True)
class Lanes:
    """An accumulator whose 16 partial sums an element are added up after the loop.

    Attributes:
        name: array [N][16] of partial sums.
        start: array [N] of what they are added to.
    """

    name: str
    start: str


Held = Scalar | Buffer | Lazy | Lanes


def row_major(shape: tuple[int, ...], index: Index) -> str:
    """Return the offset of an element in an array of this shape."""
    step, terms = 1, []
    for size, place in zip(reversed(shape), reversed(index)):
        if size != 1 and place != "0":
            terms.append(place if step == 1 else f"({place}) * {step}")
        step *= size
    return " + ".join(reversed(terms)) or "0"
