"""From the arguments of a launch to the slots that compiled code reads: eight bytes each."""

from __future__ import annotations

import ctypes
import math
import operator
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from bitnet_triton.triton_cpu import compat

# Triton's scalar types: how MLIR calls them, and their layout in a slot
_SCALARS = {
    "i1": ("i1", "?7x"), "u1": ("i1", "?7x"),
    "i8": ("i8", "b7x"), "u8": ("i8", "B7x"),
    "i16": ("i16", "h6x"), "u16": ("i16", "H6x"),
    "i32": ("i32", "i4x"), "u32": ("i32", "I4x"),
    "i64": ("i64", "q"), "u64": ("i64", "Q"),
    "fp16": ("f16", "Q"), "bf16": ("bf16", "Q"),
    "fp32": ("f32", "f4x"), "fp64": ("f64", "d"),
}  # fmt: skip


def half_bits(value: float) -> int:
    """Return the bits of ``value`` in float16, rounded to nearest even."""
    try:
        return int.from_bytes(struct.pack("<e", value), "little")
    except OverflowError:
        return 0xFC00 if value < 0 else 0x7C00


def bfloat16_bits(value: float) -> int:
    """Return the bits of ``value`` in bfloat16, rounded to nearest even."""
    if math.isnan(value):
        return 0x7FC0
    bits = int.from_bytes(struct.pack("<f", _single(value)), "little")
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _single(value: float) -> float:
    """Round to float32; what is too large becomes infinite."""
    return ctypes.c_float(value).value


_CONVERTERS = {"fp16": half_bits, "bf16": bfloat16_bits}


def _flat(signature: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Give place and type of every argument that is no constant; tuples may be nested."""
    for index, entry in enumerate(signature):
        if isinstance(entry, (tuple, list)):
            yield from _flat(entry, (*path, index))
        elif entry != "constexpr":
            yield (*path, index), entry


class Packer:
    """Packs the arguments of one compiled kernel.

    Args:
        signature: parameter -> Triton's type, constants included.
        types: the MLIR types of the compiled function's arguments.
    """

    def __init__(self, signature: dict[str, Any], types: Sequence[str]) -> None:
        self._parameters = [str(name) for name in signature]
        self._places = list(_flat(signature.values()))
        self._owners: list[tuple[int, ...]] = []  # slot -> place of the argument it comes from
        self._kinds: list[str] = []
        for place, kind in self._places:
            kinds = compat.descriptor_types(kind) if _is_descriptor(kind) else [kind]
            self._kinds += kinds
            self._owners += [place] * len(kinds)
        self._check(types)
        self._select = self._selector()
        self.pointers = [slot for slot, kind in enumerate(self._kinds) if kind[0] == "*"]
        self._converters = [
            (slot, _CONVERTERS[kind])
            for slot, kind in enumerate(self._kinds)
            if kind in _CONVERTERS
        ]
        self._formats = ["Q" if k[0] == "*" else _SCALARS[k][1] for k in self._kinds]
        self._pack = struct.Struct("<" + "".join(self._formats)).pack

    def _check(self, types: Sequence[str]) -> None:
        """Assert that both sides of the interface have the same idea of it."""
        mine = ["!tt.ptr" if k[0] == "*" else _SCALARS[k][0] for k in self._kinds]
        theirs = [re.sub(r"<.*", "", kind) for kind in types]
        if mine != theirs:
            raise NotImplementedError(
                f"the kernel takes ({', '.join(types)}), its signature means ({', '.join(mine)})"
            )

    def _selector(self) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """Return the function that picks from the arguments those that are passed on."""
        places = self._places
        if any(len(place) > 1 for place, _ in places) or any(_is_descriptor(k) for _, k in places):
            return self._flatten
        indices = [place[0] for place, _ in places]
        if len(indices) > 1:
            return operator.itemgetter(*indices)
        return lambda arguments: [arguments[index] for index in indices]

    def _flatten(self, arguments: Sequence[Any]) -> list[Any]:
        values: list[Any] = []
        for place, kind in self._places:
            value: Any = arguments
            for index in place:
                value = value[index]
            values += compat.descriptor_values(value) if _is_descriptor(kind) else [value]
        return values

    def values(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Return the value of each slot, pointers as tensors."""
        return self._select(arguments)

    def pack(self, values: Sequence[Any]) -> bytes:
        """Return the slots that hold ``values``.

        Raises:
            ValueError: a tensor is not on the CPU.
            TypeError: a value cannot be passed as what the kernel was compiled for.
            OverflowError: an integer is too large for its type.
        """
        slots = list(values)
        try:
            for slot in self.pointers:
                tensor = slots[slot]
                if not tensor.is_cpu:
                    self._refuse(slot, tensor)
                slots[slot] = tensor.data_ptr()
            for slot, convert in self._converters:
                slots[slot] = convert(slots[slot])
            return self._pack(*slots)
        except (AttributeError, TypeError, OverflowError, struct.error):
            return self._pack_slowly(values)

    def _pack_slowly(self, values: Sequence[Any]) -> bytes:
        """Pack values of rarer types, and name the one that cannot be packed."""
        return b"".join(self._pack_one(slot, value) for slot, value in enumerate(values))

    def _pack_one(self, slot: int, value: Any) -> bytes:
        kind = self._kinds[slot]
        try:
            if kind[0] == "*":
                plain = self._address(slot, value)
            elif kind == "fp32":
                plain = _single(value)
            else:
                plain = _CONVERTERS[kind](value) if kind in _CONVERTERS else value
            return struct.pack("<" + self._formats[slot], plain)
        except (TypeError, OverflowError, struct.error):
            too_large = isinstance(value, int) and kind[0] in "iu"
            raised = OverflowError if too_large else TypeError
            raise raised(f"{self.describe(slot)}: cannot pass {value!r} as {kind}") from None

    def _address(self, slot: int, value: Any) -> int:
        """Return the address that a tensor, a wrapped tensor, a number or None stands for."""
        if value is None:
            return 0
        if isinstance(value, int):
            return value
        if not hasattr(value, "data_ptr"):
            raise TypeError
        device = getattr(value, "device", None)
        if device is not None and getattr(device, "type", "cpu") != "cpu":
            self._refuse(slot, value)
        return value.data_ptr()

    def _refuse(self, slot: int, tensor: Any) -> NoReturn:
        raise ValueError(
            f"{self.describe(slot)}: expected a tensor on the CPU, got one on `{tensor.device}`"
        )

    def describe(self, slot: int) -> str:
        """Name the argument that a slot belongs to."""
        first, *rest = self._owners[slot]
        return f"`{self._parameters[first]}{''.join(f'[{index}]' for index in rest)}`"


def _is_descriptor(kind: str) -> bool:
    return kind.startswith("tensordesc")


def storage_range(value: Any) -> tuple[int, int]:
    """Return the memory that a pointer argument may reach: first address, one past the last."""
    try:
        storage = value.untyped_storage()
    except AttributeError:
        base = getattr(value, "base", None)  # triton.reinterpret wraps a tensor
        if base is not None:
            return storage_range(base)
        # a bare address may lead anywhere, None nowhere
        return (0, 2**64) if isinstance(value, int) and value else (0, 0)
    start = storage.data_ptr()
    return start, start + storage.nbytes()


def overlap(values: Sequence[Any], pairs: Sequence[tuple[int, int]]) -> bool:
    """Tell whether two pointer arguments, of those in ``pairs``, share memory."""
    ranges: dict[int, tuple[int, int]] = {}
    for i, j in pairs:
        start, end = ranges.get(i) or ranges.setdefault(i, storage_range(values[i]))
        other_start, other_end = ranges.get(j) or ranges.setdefault(j, storage_range(values[j]))
        if start < other_end and other_start < end:
            return True
    return False
