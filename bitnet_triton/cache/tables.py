"""A cache layer that keeps everything, and tables in which sampling looks its keys up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.cache.following import FollowingLayer
from bitnet_triton.cache.key_values import SLOT
from bitnet_triton.cache.memory import Call
from bitnet_triton.cache.transfers import Transfers
from bitnet_triton.kernels import HashTables


class TablesLayer(FollowingLayer):
    """Keys and values, with ``HashTables`` of the keys from the end of the prompt on.

    They are built when the prompt is over, around the mean of its keys, and take in every token
    after it. What ``crop`` leaves of the prompt alone has none, until the prompt is over again;
    keys that somebody replaces get new ones.

    Args:
        bits: of a code.
        tables: how many.
        seed: of the planes.
        device: where keys, values and tables lie; None: where the model does.

    Attributes:
        hashed: the tables; None before the prompt is over.
        leftpad: int32 [B], the first column that is no padding, or None; ``begin`` tells it.
    """

    def __init__(self, bits: int, tables: int, seed: int, device: str | None = None) -> None:
        super().__init__()
        self.bits, self.count, self.seed = bits, tables, seed
        self.transfers = None if device is None else Transfers(device)
        self.hashed: HashTables | None = None
        self.leftpad: Tensor | None = None
        self._prompt: int | None = None  # tokens that belong to the prompt, as far as is known
        self._built = 0  # tokens that the tables were built from
        self._phases = torch.empty(0), torch.empty(0)

    @property
    def is_decoding(self) -> bool:
        """Whether the tokens of the call were generated, and there are tables for them."""
        return self.hashed is not None and self._is_told

    def begin(self, call: Call) -> None:
        """Note the padding of a call, and the length of the prompt."""
        super().begin(call)
        if self.transfers is None or call.leftpad is None:
            self.leftpad = call.leftpad
        elif self.hashed is None or self.leftpad is None:  # it stays as it is behind the prompt
            (self.leftpad,) = self.transfers.send(call.leftpad)
        self._prompt = call.prompt_len if isinstance(call.prompt_len, int) else None

    def prompt_is_over(self) -> None:
        """Build the tables, unless there are some."""
        super().prompt_is_over()
        if self.held and (self.hashed is None or not self.is_known):
            self._build()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B Hk T D], and take them into the tables.

        All that is held is returned where it lies; a prompt that is all of it, where it was made.
        """
        states = key_states, value_states
        if self.transfers is not None:
            key_states, value_states = self.transfers.send(*states)
        tables, is_known = self.hashed, self.is_known
        self.hashed = None
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.hashed, self._known = tables, keys
        if tables is not None and not is_known:
            self._build()
        elif tables is not None:
            tables.follow(keys.detach().transpose(1, 2))
        is_all = self.hashed is None and keys.shape[2] == states[0].shape[2]
        return states if self.transfers is not None and is_all else (keys, values)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        """Attend densely where the model does."""
        if self.transfers is not None and k.device != q.device:
            k, v = self.transfers.fetch(k, v, device=q.device)
        return super().attend(q, k, v, **settings)

    def reserve(self, new: int) -> None:
        """Make room for ``new`` tokens, in the tables as well."""
        is_known = self.is_known
        super().reserve(new)
        self._known = self.keys if is_known else None
        if self.hashed is not None and is_known:
            self.hashed.reserve(self.stores[0].shape[2])

    def address(self) -> tuple[Tensor, ...]:
        """Return all stores, and what tells whether tokens are generated."""
        held = self.hashed.tensors if self.hashed is not None else ()
        return (*super().address(), *held, self._phases[self.is_decoding])

    def is_ready(self, B: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether a step can be recorded: not where somebody has replaced keys."""
        is_known = self.hashed is None or self.is_known
        return is_known and super().is_ready(B, dtype, device)

    def advance(self, new: int) -> None:
        """Count ``new`` tokens as held, whose codes ``write`` has made."""
        is_known = self.is_known
        super().advance(new)
        self._keep(is_known)
        if new and self.hashed is not None:
            assert self.keys is not None
            self.hashed.count(self.keys.transpose(1, 2))

    def write(self, heads: Tensor, cos: Tensor, sin: Tensor, places: Tensor) -> Tensor:
        """Rotate and store the new token, and make its code."""
        q = super().write(heads, cos, sin, places)
        if self.hashed is not None:
            self.hashed.launch_token(self.stores[0].transpose(1, 2), places[SLOT])
        return q

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens; tables go with the first token that they were built from."""
        is_known = self.is_known
        super().crop(tokens_to_remove)
        self._keep(is_known)
        if self.hashed is None:
            return
        if not is_known or self.held < self._built:
            self.hashed = None
        else:
            self.hashed.crop(self.held)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.hashed = self.leftpad = None
        self._is_told = False

    def saved(self) -> dict[str, Tensor]:
        """Return what ``restore`` needs, the tables and their planes among it."""
        saved = super().saved()
        if self.hashed is not None:
            told = {"planes": self.hashed.planes, **self.hashed.saved()}
            told["built"] = torch.tensor([self._built])
            saved |= {f"tables.{name}": t for name, t in told.items()}
        return saved

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Become what ``saved`` has told; the layer is empty.

        Raises:
            CheckpointError: the tables are not such as the layer has, or not those of its keys.
        """
        super().restore(saved)
        told = {n.removeprefix("tables."): t for n, t in saved.items() if n.startswith("tables.")}
        if not told:
            return
        if self.transfers is not None:
            told = dict(zip(told, self.transfers.send(*told.values())))
        assert self.keys is not None
        self._built = int(told["built"])
        self.hashed = HashTables.restore(
            self.keys.transpose(1, 2), told, bits=self.bits, tables=self.count, seed=self.seed,
            leftpad=self.leftpad,
        )  # fmt: skip
        self._known = self.keys

    def _build(self) -> None:
        """Make tables of all keys, around those of the prompt."""
        assert self.keys is not None
        keys = self.keys.detach().transpose(1, 2)
        self._built = min(self._prompt or keys.shape[1], keys.shape[1])
        self.hashed = HashTables.build(
            keys[:, : self._built], bits=self.bits, tables=self.count, seed=self.seed,
            leftpad=self.leftpad,
        )  # fmt: skip
        self.hashed.follow(keys)
        self._known = self.keys

    def _change_rows(self, change: Callable[[Tensor], Tensor], is_known: bool) -> None:
        if self.leftpad is not None:
            self.leftpad = change(self.leftpad)
        super()._change_rows(change, is_known)
        if self.hashed is not None:
            self.hashed.change_rows(change)
            assert self.keys is not None
            self.hashed.keys = self.keys.transpose(1, 2)
