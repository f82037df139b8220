"""From the arguments of a launch to the slots that compiled code reads: eight bytes each."""

from __future__ import annotations

import ctypes
import math
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
        disjoint: pairs of slots, of pointers that the compiled code takes to share no memory.
    """

    def __init__(
        self, signature: dict[str, Any], types: Sequence[str], disjoint: Sequence[Sequence[int]]
    ) -> None:
        self._parameters = [str(name) for name in signature]
        self._places = list(_flat(signature.values()))
        self._owners: list[tuple[int, ...]] = []  # slot -> place of the argument it comes from
        self._kinds: list[str] = []
        for place, kind in self._places:
            kinds = compat.descriptor_types(kind) if _is_descriptor(kind) else [kind]
            self._kinds += kinds
            self._owners += [place] * len(kinds)
        self._check(types)
        self._formats = ["Q" if k[0] == "*" else _SCALARS[k][1] for k in self._kinds]
        self._nested = len(self._kinds) > len(self._places) or any(
            len(place) > 1 or _is_descriptor(kind) for place, kind in self._places
        )
        self._pairs = [(self._position(i), self._position(j)) for i, j in disjoint]
        self._involved = sorted({k for pair in self._pairs for k in pair})
        self._pack = self._make_pack()
        self._overlap = self._make_overlap()

    def _check(self, types: Sequence[str]) -> None:
        """Assert that both sides of the interface have the same idea of it."""
        mine = ["!tt.ptr" if k[0] == "*" else _SCALARS[k][0] for k in self._kinds]
        theirs = [re.sub(r"<.*", "", kind) for kind in types]
        if mine != theirs:
            raise NotImplementedError(
                f"the kernel takes ({', '.join(types)}), its signature means ({', '.join(mine)})"
            )

    def _position(self, slot: int) -> int:
        """Return where the value of a slot is in what ``_values`` returns."""
        return slot if self._nested else self._owners[slot][0]

    def _make_pack(self) -> Callable[..., bytes]:
        """Return a function that packs values; it is written for this signature, to be fast.

        For a tensor, a constant and a number it reads
        ``lambda v0, v1, v2: pack(v0.data_ptr(), v2) if v0.is_cpu else slowly(v0, v1, v2)``.
        """
        names = [f"v{i}" for i in range(len(self._kinds if self._nested else self._parameters))]
        fields, checks = [], []
        for slot, kind in enumerate(self._kinds):
            name = names[self._position(slot)]
            if kind[0] == "*":
                checks.append(f"{name}.is_cpu")
                fields.append(f"{name}.data_ptr()")
            else:
                fields.append(f"{kind}({name})" if kind in _CONVERTERS else name)
        every = ", ".join(names)
        text = f"lambda {every}: pack({', '.join(fields)})"
        if checks:
            text += f" if {' and '.join(checks)} else slowly({every})"
        pack = struct.Struct("<" + "".join(self._formats)).pack
        return eval(text, {"pack": pack, "slowly": self._pack_slowly, **_CONVERTERS})

    def _values(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Take tuples and descriptors apart; without any, return the arguments as they are."""
        if not self._nested:
            return arguments
        values: list[Any] = []
        for place, kind in self._places:
            value: Any = arguments
            for index in place:
                value = value[index]
            values += compat.descriptor_values(value) if _is_descriptor(kind) else [value]
        return values

    def pack(self, arguments: Sequence[Any]) -> bytes:
        """Return the slots that hold ``arguments``.

        Args:
            arguments: of all parameters of the kernel, constants included.

        Raises:
            ValueError: a tensor is not on the CPU.
            TypeError: a value cannot be passed as what the kernel was compiled for.
            OverflowError: an integer is too large for its type.
        """
        values = self._values(arguments)
        try:
            return self._pack(*values)
        except (AttributeError, TypeError, OverflowError, struct.error):
            return self._pack_slowly(*values)

    def overlap(self, arguments: Sequence[Any]) -> bool:
        """Tell whether two pointers share memory that the compiled code takes to share none."""
        values = self._values(arguments)
        try:
            return self._overlap(values)
        except AttributeError:
            return self._overlap_slowly(values)

    def _make_overlap(self) -> Callable[[Sequence[Any]], bool]:
        """Return a function that compares tensors; it is written for these pairs, to be fast."""
        lines = ["def overlap(values):"]
        for k in self._involved:
            lines.append(f"  storage = values[{k}].untyped_storage()")
            lines.append(f"  start{k} = storage.data_ptr()")
            lines.append(f"  end{k} = start{k} + storage.nbytes()")
        tests = [f"start{i} < end{j} and start{j} < end{i}" for i, j in self._pairs]
        lines.append(f"  return {' or '.join(tests) or False}")
        scope: dict[str, Any] = {}
        exec("\n".join(lines), scope)
        return scope["overlap"]

    def _overlap_slowly(self, values: Sequence[Any]) -> bool:
        for i, j in self._pairs:
            start, end = storage_range(values[i])
            other_start, other_end = storage_range(values[j])
            if start < other_end and other_start < end:
                return True
        return False

    def _pack_slowly(self, *values: Any) -> bytes:
        """Pack values of rarer types, and name the one that cannot be packed."""
        slots = range(len(self._kinds))
        return b"".join(self._pack_one(slot, values[self._position(slot)]) for slot in slots)

    def _pack_one(self, slot: int, value: Any) -> bytes:
        kind = self._kinds[slot]
        plain: Any
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
