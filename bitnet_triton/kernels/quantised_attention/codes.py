"""Codes of keys and values: how they are made, what they stand for, and where they lie.

Tokens come in groups of ``GROUP``. Keys of 4 bits have a scale and a zero for each channel of a
group (arXiv:2402.02750), everything else has one scale a token and head. A byte of two codes holds
channel c in its low half and channel c + D / 2 in its high one.

Bytes lie as products of integers read them, four neighbours along a sum side by side: a group of
keys as [W / 4, GROUP, 4], four channels of each token after the other; a group of values as
[GROUP / 4, W, 4], four tokens of each channel. W is the bytes of a token, D or D / 2. What is
computed with 64 bytes at a time unpacks them by a mask and a shift, and moves none.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bitnet_triton.kernels.hadamard import hadamard
from bitnet_triton.runtime.huge_pages import in_huge_pages

GROUP = 64  # tokens whose keys share the scale of a channel

_TINY = 1e-30
_LARGEST_ZERO = 1024.0  # steps: float16 holds such a zero to half a step


@dataclass(frozen=True, eq=False)
class KeyValueCodes:
    """Codes of keys and values, of [B Hk capacity D]; the capacity is a multiple of ``GROUP``.

    Attributes:
        keys: [B Hk capacity / GROUP, W / 4, GROUP, 4]: int8 with W = D, or uint8 of 4 bits with
            W = D / 2.
        values: [B Hk capacity / GROUP, GROUP / 4, W, 4], likewise.
        key_scale: float32 [B Hk capacity]; of 4 bits bfloat16 [B Hk capacity / GROUP, D].
        key_zero: None; of 4 bits float16 [B Hk capacity / GROUP, D], the code that means 0.
        value_scale: float32 [B Hk capacity]; the code 8 of 4 bits means 0.
        is_rotated: whether ``hadamard`` came before; queries are rotated then, and outputs back.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor
    key_zero: Tensor | None
    value_scale: Tensor
    is_rotated: bool = True

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return 8 if self.keys.dtype == torch.int8 else 4

    @property
    def head_dim(self) -> int:
        """D."""
        return self.values.shape[-2] * (8 // self.bits)

    @property
    def capacity(self) -> int:
        """How many tokens there is room for."""
        return self.keys.shape[2] * GROUP

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: t for name, t in found.items() if isinstance(t, Tensor)}

    @classmethod
    def empty(
        cls, B: int, Hk: int, groups: int, D: int, bits: int, device: torch.device, rotate: bool
    ) -> KeyValueCodes:
        """Return room for groups of tokens, zeros.

        Raises:
            ValueError: D is no multiple of 16, or of 8 without a rotation.
        """
        least = 16 if rotate else 8
        if D % least:
            raise ValueError(
                f"`cache`: codes are for heads of a multiple of {least} values "
                f"with rotate={rotate}, got {D}"
            )

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return in_huge_pages(torch.empty((B, Hk, *shape), dtype=dtype, device=device)).zero_()

        T, W = groups * GROUP, D * bits // 8
        dtype = torch.int8 if bits == 8 else torch.uint8
        keys = zeros(groups, W // 4, GROUP, 4, dtype=dtype)
        values = zeros(groups, GROUP // 4, W, 4, dtype=dtype)
        if bits == 8:
            return cls(keys, values, zeros(T), None, zeros(T), rotate)
        scale, zero = (zeros(groups, D, dtype=t) for t in (torch.bfloat16, torch.float16))
        return cls(keys, values, scale, zero, zeros(T), rotate)

    def larger(self, groups: int) -> KeyValueCodes:
        """Return a copy with room for as many groups."""
        B, Hk = self.keys.shape[:2]
        made = type(self).empty(
            B, Hk, groups, self.head_dim, self.bits, self.keys.device, self.is_rotated
        )
        for name, t in self.tensors().items():
            getattr(made, name)[:, :, : t.shape[2]] = t
        return made

    def changed(self, change: object) -> KeyValueCodes:
        """Return what ``change``, a function of tensors, makes of each."""
        assert callable(change)
        made = {name: change(t) for name, t in self.tensors().items()}
        return KeyValueCodes(**{"key_zero": None, **made}, is_rotated=self.is_rotated)

    def write(self, row: int, group: int, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values [Hk T D] of whole groups of one row from ``group`` on, as codes."""
        with torch.no_grad():
            pair = [t.detach().float() for t in (keys, values)]
            if self.is_rotated:
                pair = [hadamard(t) for t in pair]
            k, v = pair
            start, end = group * GROUP, group * GROUP + k.shape[-2]
            groups = slice(group, end // GROUP)
            value_codes, scale = _by_token(v, 127 if self.bits == 8 else 7)
            self.value_scale[row, :, start:end] = scale
            if self.bits == 8:
                key_codes, scale = _by_token(k, 127)
                self.key_scale[row, :, start:end] = scale
            else:
                key_codes, steps, zero = _by_channel(k)
                assert self.key_zero is not None
                self.key_scale[row, :, groups], self.key_zero[row, :, groups] = steps, zero
                key_codes, value_codes = _packed(key_codes), _packed(value_codes + 8)
            self.keys[row, :, groups] = _fours_of_channels(key_codes)
            self.values[row, :, groups] = _fours_of_tokens(value_codes)

    def read(self, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values that codes of one row stand for, float32 [Hk T D]."""
        groups = slice(start // GROUP, -(-end // GROUP))
        first = groups.start * GROUP
        k = self.keys[row, :, groups].transpose(2, 3).flatten(3).flatten(1, 2)  # [Hk T W]
        v = self.values[row, :, groups].transpose(3, 4).flatten(1, 3)
        k, v = (t[:, start - first : end - first] for t in (k, v))
        if self.bits == 8:
            k = k * self.key_scale[row, :, start:end, None]
            v = v * self.value_scale[row, :, start:end, None]
        else:
            assert self.key_zero is not None
            group = torch.arange(start, end, device=k.device) // GROUP
            scale, zero = (t[row][:, group].float() for t in (self.key_scale, self.key_zero))
            k = (_unpacked(k) - zero) * scale
            v = (_unpacked(v) - 8) * self.value_scale[row, :, start:end, None]
        return (hadamard(k), hadamard(v)) if self.is_rotated else (k, v)


def _by_token(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Return codes of x [Hk T D], at most ``largest``, and scales [Hk T]: x is codes * scale."""
    scale = (x.abs().amax(-1) / largest).clamp_min(_TINY)
    return (x / scale[..., None]).round().to(torch.int8), scale


def _by_channel(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes 0 to 15 of x [Hk T D], scales and zeros [Hk T / GROUP, D].

    x is about (codes - zero) * scale. Codes are made for the scale and the zero as they are kept.
    """
    x = x.unflatten(1, (-1, GROUP))
    low, high = x.amin(2), x.amax(2)
    # a channel that hardly changes: its zero stays within what float16 tells apart
    least = torch.maximum(low.abs(), high.abs()) / _LARGEST_ZERO
    scale = torch.maximum((high - low) / 15, least).clamp_min(_TINY).bfloat16()
    zero = (-low / scale.float()).half()
    codes = (x / scale.float()[:, :, None] + zero.float()[:, :, None]).round().clamp(0, 15)
    return codes.to(torch.uint8).flatten(1, 2), scale, zero


def _fours_of_channels(x: Tensor) -> Tensor:
    """Return x [Hk T W] as keys lie: [Hk, T / GROUP, W / 4, GROUP, 4]."""
    return x.unflatten(2, (-1, 4)).unflatten(1, (-1, GROUP)).transpose(2, 3)


def _fours_of_tokens(x: Tensor) -> Tensor:
    """Return x [Hk T W] as values lie: [Hk, T / GROUP, GROUP / 4, W, 4]."""
    return x.unflatten(1, (-1, GROUP // 4, 4)).transpose(3, 4)


def _packed(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def _unpacked(both: Tensor) -> Tensor:
    return torch.cat([both & 15, both >> 4], dim=-1).float()
