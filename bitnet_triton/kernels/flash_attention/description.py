"""What a mask says: its fields and which of them go together. ``mask.py`` is what can be asked."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

PATTERNS = ("local", "strided", "fixed")

_Description = TypeVar("_Description", bound="MaskDescription")


@dataclass(frozen=True, eq=False)
class MaskDescription:
    """The fields of a ``Mask``, checked; they are explained there."""

    causal: bool = True
    window: int | None = None
    window_right: int | None = None
    sinks: int = 0
    dilation: int | tuple[int, ...] = 1
    global_tokens: Tensor | tuple[int, ...] | None = None
    dense_from: int | Tensor | None = None
    pattern: str | None = None
    block: int | None = None
    summary: int = 1

    def __post_init__(self) -> None:
        for name in ("dilation", "global_tokens"):  # JSON has lists only
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.causal, bool):
            raise TypeError(f"`causal`: expected a bool, got {type(self.causal).__name__}")
        for name, least in (("window", 1), ("window_right", 0), ("block", 1)):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), least)
        _check_number("sinks", self.sinks, 0)
        _check_number("summary", self.summary, 1)
        self._check_tensors()
        self._check_combinations()

    def _check_tensors(self) -> None:
        for step in self.dilations:
            _check_number("dilation", step, 1)
        tokens, start = self.global_tokens, self.dense_from
        if isinstance(tokens, Tensor):
            if tokens.dtype != torch.bool:
                raise TypeError(f"`global_tokens`: expected dtype bool, got {tokens.dtype}")
        elif tokens is not None:
            if not isinstance(tokens, tuple):
                raise TypeError(
                    "`global_tokens`: expected positions or a bool tensor, got "
                    f"{type(tokens).__name__}"
                )
            for position in tokens:
                _check_number("global_tokens", position, 0)
        if isinstance(start, Tensor):
            if start.dtype != torch.int32 or start.ndim != 1:
                raise TypeError(
                    f"`dense_from`: expected int32 [B], got {start.dtype} {list(start.shape)}"
                )
        elif start is not None:
            _check_number("dense_from", start, 0)

    def _check_combinations(self) -> None:
        if self.causal and self.window_right is not None:
            raise ValueError("`window_right`: a causal mask shows no key to the right")
        if self.pattern is not None and self.pattern not in PATTERNS:
            wanted = ", ".join(PATTERNS)
            raise ValueError(f"`pattern`: expected one of {wanted}, got {self.pattern!r}")
        if (self.pattern is None) != (self.block is None):
            raise ValueError(
                f"`block`: goes with a pattern, got block={self.block} and pattern={self.pattern!r}"
            )
        if self.summary != 1 and self.pattern != "fixed":
            raise ValueError("`summary`: goes with the pattern 'fixed'")
        if self.block is not None and self.summary > self.block:
            raise ValueError(f"`summary`: expected at most `block`, got {self.summary}")

    @property
    def dilations(self) -> tuple[int, ...]:
        """The dilation of each head, or the one of all."""
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskDescription):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        values = [getattr(self, field.name) for field in fields(self)]
        return hash(tuple([tuple(v.shape) if isinstance(v, Tensor) else v for v in values]))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, as data that JSON can hold.

        Raises:
            TypeError: a field is a tensor.
        """
        changed = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if not _equal(getattr(self, field.name), field.default)
        }
        for name, value in changed.items():
            if isinstance(value, Tensor):
                raise TypeError(f"`{name}`: a tensor cannot be written as JSON")
        return json.loads(json.dumps(changed))

    def of_row(self: _Description, row: int, start: int, end: int) -> _Description:
        """Return the mask of one packed sequence, whose keys are ``start`` to ``end``."""
        changes: dict[str, Tensor] = {}
        if isinstance(self.global_tokens, Tensor):
            changes["global_tokens"] = self.global_tokens[start:end][None]
        if isinstance(self.dense_from, Tensor):
            changes["dense_from"] = self.dense_from[row : row + 1]
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]


def _check_number(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}`: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"`{name}`: expected at least {least}, got {value}")


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.device == b.device and torch.equal(a, b))
    return type(a) is type(b) and a == b
