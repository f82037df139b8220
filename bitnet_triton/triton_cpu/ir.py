"""The part of MLIR that the emitter needs: types, values, operations, blocks, and who uses what."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

_TENSOR = re.compile(r"^tensor<((?:\d+x)*)(.+)>$")
_POINTER = "!tt.ptr<"


class UnsupportedOperation(NotImplementedError):
    """An operation that the backend cannot run; the message names it and its source line."""


@dataclass(frozen=True)
class Type:
    """A scalar (``shape`` None) or a block of scalars or of pointers to scalars.

    Attributes:
        shape: sizes of a block, None for a scalar.
        elem: MLIR name of the scalar, or of what the pointer points to ("i32", "bf16", ...).
        pointer: whether the scalars are addresses.
    """

    shape: tuple[int, ...] | None
    elem: str
    pointer: bool = False

    @cached_property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape or ())

    @property
    def rank(self) -> int:
        """Number of dimensions; 0 for a scalar."""
        return len(self.shape or ())

    def scalar(self) -> Type:
        """Return the type of one element."""
        return Type(None, self.elem, self.pointer)


def parse_type(text: str) -> Type:
    """Read an MLIR type as printed, for instance ``tensor<64x1x!tt.ptr<f32>>``."""
    shape = None
    match = _TENSOR.match(text)
    if match:
        shape = tuple(int(size) for size in match.group(1).split("x") if size)
        text = match.group(2).split(", #")[0]
    if not text.startswith(_POINTER):
        return Type(shape, text)
    elem = text[len(_POINTER) : -1].split(",")[0].strip()
    # What a pointer to pointers points to is an address: 64 bits
    return Type(shape, "i64" if elem.startswith(_POINTER) else elem, pointer=True)


@dataclass(eq=False)
class Value:
    """An SSA value: the result of an operation or the argument of a block."""

    type: Type
    name: str
    op: Op | None = field(default=None, repr=False)
    block: Block | None = field(default=None, repr=False)
    uses: list[Op] = field(default_factory=list, repr=False)

    @property
    def is_block(self) -> bool:
        """Whether the value is a tensor."""
        return self.type.shape is not None


@dataclass(eq=False)
class Op:
    """One operation in MLIR's generic form."""

    name: str
    operands: list[Value]
    results: list[Value]
    attributes: dict[str, str]
    regions: list[list[Block]] = field(repr=False)
    successors: list[str]
    location: str
    block: Block | None = field(default=None, repr=False)
    index: int = 0

    def integer(self, attribute: str, default: int = 0) -> int:
        """Return an integer attribute (``axis = 1 : i32``)."""
        text = self.attributes.get(attribute)
        return default if text is None else int(text.split(":")[0])

    def integers(self, attribute: str) -> tuple[int, ...]:
        """Return an array attribute (``order = array<i32: 1, 0>``)."""
        text = self.attributes.get(attribute, "")
        body = text.partition(":")[2].rstrip(">")
        return tuple(int(part) for part in body.split(",") if part.strip())

    def flag(self, attribute: str) -> bool:
        """Return a boolean attribute."""
        return self.attributes.get(attribute) == "true"

    def unsupported(self, reason: str = "") -> UnsupportedOperation:
        """Return the error that says that this operation cannot run."""
        because = f" ({reason})" if reason else ""
        return UnsupportedOperation(f"{self.location}: `{self.name}` is not supported{because}")


@dataclass(eq=False)
class Block:
    """A sequence of operations; ``parent`` is the operation that holds it."""

    args: list[Value]
    label: str = ""
    ops: list[Op] = field(default_factory=list, repr=False)
    parent: Op | None = field(default=None, repr=False)

    def append(self, op: Op) -> None:
        """Add ``op`` at the end."""
        op.block, op.index = self, len(self.ops)
        self.ops.append(op)

    def inside(self, other: Block) -> bool:
        """Tell whether this block is ``other`` or lies in one of its operations."""
        block: Block | None = self
        while block is not None:
            if block is other:
                return True
            block = block.parent.block if block.parent is not None else None
        return False


def position(op: Op, block: Block | None) -> int | None:
    """Return the index in ``block`` of ``op`` or of the operation that holds it; None outside."""
    current: Op | None = op
    while current is not None:
        if current.block is block:
            return current.index
        current = current.block.parent if current.block is not None else None
    return None


def used_after(value: Value, op: Op) -> bool:
    """Tell whether ``value`` is read after ``op``, or inside its regions."""
    for use in value.uses:
        where = position(use, op.block)
        if where is not None and (where > op.index or (where == op.index and use is not op)):
            return True
    return False
