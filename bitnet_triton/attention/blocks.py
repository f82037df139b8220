"""Modes that read chosen blocks of keys: what they share, whatever chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import attend_and_tell, check_served
from bitnet_triton.attention.mode import Mode, Reads, Step, StepLayer, StepTensors
from bitnet_triton.attention.tokens import CAUSAL
from bitnet_triton.cache import Memory, UnitsLayer
from bitnet_triton.cache.key_values import LEFTPAD, USED
from bitnet_triton.kernels import (
    Units,
    flash_attention,
    pool_keys,
    selected_block_attention,
    top_blocks,
)


class Rows(NamedTuple):
    """Where the queries of a call stand among its keys.

    Attributes:
        tokens: columns up to the last query, padding included.
        leftpad: int32 [B], or None.
        starts: int32 [S + 1] of packed sequences, or None.
    """

    tokens: int
    leftpad: Tensor | None
    starts: Tensor | None


class BlockMode(Mode):
    """A mode that attends to the blocks of keys that it has chosen for each token.

    Subclasses are frozen dataclasses of their settings, which say how a block is found. The choice
    carries no gradient; queries, keys and values learn through the attention to what was chosen.
    Blocks count from the first token of a row that is no padding, and from the start of each packed
    sequence.

    Attributes:
        dense_below: queries among the first so many tokens of a text read everything; a text that
            is no longer is computed bit by bit as by full attention.
    """

    dense_below: int

    @property
    def size(self) -> int:
        """Tokens of a block."""
        raise NotImplementedError

    @property
    def units(self) -> tuple[Units, ...]:
        """Which units of keys its memory has to keep."""
        return ()

    def choose(self, q: Tensor, k: Tensor, rows: Rows, context: AttentionContext) -> Tensor:
        """Return the blocks that queries [B Tq H D] read of keys [B Tk Hk D].

        Returns:
            int32 [B Tq sets S], with a set for each head of keys or of queries.
        """
        raise NotImplementedError

    def check_settings(self) -> None:
        """Raise unless what all of them have is in range."""
        check_number("dense_below", self.dense_below, 0)

    def memory(self, other: Mode) -> Memory:
        """Return a memory of keys, values and units of keys, for both modes."""
        return self.build_memory(other, self.modes_of_memory(other))

    def modes_of_memory(self, other: Mode) -> list[BlockMode]:
        """Return the modes whose units a memory keeps; raise where ``other`` needs another one."""
        if isinstance(other, BlockMode):
            return [self] if other == self else [self, other]
        if other.brings_memory and other.kept is None:
            raise ValueError(f"`attention`: no memory serves {self.name!r} and {other.name!r}")
        return [self]

    def build_memory(self, other: Mode, modes: list[BlockMode]) -> Memory:
        """Return the memory of ``modes``; ``other`` is the mode of the other phase."""
        if isinstance(other, BlockMode) and type(other).build_memory is not BlockMode.build_memory:
            return other.build_memory(self, modes)  # it keeps more, and decides for both
        units = [each for mode in modes for each in mode.units]
        return UnitsLayer(units, [mode.dense_below for mode in modes])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        self.check_call(q, k, context)
        rows = rows_of(q, context)
        first = self._first_sparse(q.shape[1], rows)
        if first == q.shape[1]:
            return attend_and_tell(q, k, v, CAUSAL, context)
        k, v = k[:, : rows.tokens], v[:, : rows.tokens]
        ahead = rows.tokens - q.shape[1] + first
        parts = []
        if first:
            parts.append(_dense(q[:, :first], k[:, :ahead], v[:, :ahead], rows, context))
        parts.append(self._chosen(q[:, first:], k, v, rows, context))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def reads(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Reads:
        """Count the tokens of the blocks that it chooses, and the units by which it chooses."""
        rows = rows_of(q, context)
        if rows.tokens <= self.dense_below:
            return Reads(rows.tokens, rows.tokens)
        indices = self.choose(q, k[:, : rows.tokens], rows, context)[:, -1]  # [B sets S]
        left = 0 if rows.leftpad is None else rows.leftpad[:, None, None]
        tokens = (rows.tokens - left - indices * self.size).clamp(0, self.size) * (indices >= 0)
        read = tokens.sum(-1).float().mean().item()
        return Reads(read, read + self.compared(rows.tokens))

    def compared(self, tokens: int) -> float:
        """Return how many units of ``tokens`` tokens a query is compared with."""
        return sum((tokens - each.window) // each.stride + 1 for each in self.units)

    def check_call(self, q: Tensor, k: Tensor, context: AttentionContext) -> None:
        """Raise ValueError where a call asks for what the mode does not do."""
        check_served(self, context)
        if context.softcap is not None:
            raise ValueError(f"`softcap`: attention {self.name!r} goes without")
        if context.tokens.cu_seqlens is not None and k.shape[1] != q.shape[1]:
            raise ValueError("`position_ids`: packed sequences go without a cache")

    def _first_sparse(self, Tq: int, rows: Rows) -> int:
        """Return how many of the first queries stand below the switch in every row."""
        if rows.starts is not None:
            return Tq if Tq <= self.dense_below else 0
        return min(max(self.dense_below - (rows.tokens - Tq), 0), Tq)

    def _chosen(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, context: AttentionContext
    ) -> Tensor:
        """Attend to the chosen blocks, and to everything where a row is still below the switch."""
        out = _attend(q, k, v, self.choose(q, k, rows, context), self.size, rows, context)
        if not self.dense_below or (rows.leftpad is None and rows.starts is None):
            return out
        is_dense = _positions(q, rows) < self.dense_below
        return torch.where(is_dense[..., None, None], _dense(q, k, v, rows, context), out)

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Write the new token into the memory, choose, and read what was chosen."""
        if not isinstance(memory, UnitsLayer) or set(self.units) - set(memory.units):
            return "its cache does not keep what it chooses by"
        objection = self.step_objection(memory)
        if objection is not None:
            return objection
        if memory.is_dense(self.dense_below):

            def run_dense(step: StepTensors) -> Tensor:
                q = memory.write(step.heads, step.cos, step.sin, step.places)
                return memory.decode(q, step.places, mask=CAUSAL, scale=layer.scale)[0]

            return run_dense
        choose = self.step_choice(memory, layer)
        if isinstance(choose, str):
            return choose

        def run(step: StepTensors) -> Tensor:
            q = memory.write(step.heads, step.cos, step.sin, step.places)
            return read_blocks(memory, q, choose(q, step), step.places, self.size, layer.scale)

        return run

    def step_objection(self, memory: Memory) -> str | None:
        """Say what a memory keeps that a recorded step of the mode does not make; None: nothing."""
        return memory.decode_objection(CAUSAL)

    def step_choice(
        self, memory: Any, layer: StepLayer
    ) -> Callable[[Tensor, StepTensors], Tensor] | str:
        """Return what maps queries [B 1 H D] of a step to blocks by launches, or why not."""
        raise NotImplementedError


def rows_of(q: Tensor, context: AttentionContext) -> Rows:
    """Return where queries [B Tq H D] stand."""
    tokens = context.tokens
    # a static cache counts in a tensor: to slice its keys takes the number
    return Rows(int(tokens.offset) + q.shape[1], tokens.leftpad, tokens.cu_seqlens)


def units_of(k: Tensor, units: Units, rows: Rows, context: AttentionContext) -> Tensor:
    """Return the units of keys [B Tk Hk D], from the memory of the layer if it keeps them."""
    memory = context.memory
    if isinstance(memory, UnitsLayer) and units in memory.units:
        return memory.sums(units).to(k.dtype)  # under autocast it holds wider keys
    if rows.starts is None:
        return pool_keys(k, units=units, leftpad=rows.leftpad)
    return pool_keys(k.flatten(0, 1), units=units, cu_seqlens=rows.starts)


def choose_blocks(
    q: Tensor, keys: Tensor, rows: Rows, *, scale: Tensor | None = None, **settings: Any
) -> Tensor:
    """Call ``top_blocks`` for the rows of a call; units of packed sequences are packed.

    Lists have no more places than a short text has blocks, rounded up to a power of two.
    """
    if not torch.compiler.is_compiling():  # a graph would be one for each such number
        settings |= {"selected": _places(rows.tokens, **settings)}
    if rows.starts is None:
        return top_blocks(
            q, keys, scale=scale, tokens=rows.tokens, leftpad=rows.leftpad, **settings
        )
    packed = top_blocks(q.flatten(0, 1), keys, scale=scale, cu_seqlens=rows.starts, **settings)
    return packed.unflatten(0, q.shape[:2])


def _places(tokens: int, *, block: int, selected: int, initial: int, local: int, **_: Any) -> int:
    """Return how many blocks to choose of a text, with few numbers for all lengths."""
    blocks = max(-(-tokens // block), initial + local)
    return min(selected, 1 << (blocks - 1).bit_length())


def check_blocks(mode: Any, block: int) -> None:
    """Raise unless the numbers of a mode that chooses blocks are in range."""
    check_number("block", block, 1)
    check_number("initial", mode.initial, 0)
    check_number("local", mode.local, 1)
    check_number("selected", mode.selected, 1)
    if mode.selected < mode.initial + mode.local:
        raise ValueError(
            "`attention`: 'selected': expected at least 'initial' + 'local' = "
            f"{mode.initial + mode.local}, got {mode.selected}"
        )
    mode.check_settings()


def launched_choice(
    memory: Any, units: Units, sets: int, settings: dict[str, Any]
) -> Callable[[Tensor, StepTensors], Tensor]:
    """Return what chooses by the units of a memory, by launches alone."""
    from bitnet_triton.kernels.top_blocks.forward import launch_top_blocks

    def choose(q: Tensor, step: StepTensors) -> Tensor:
        store, tokens = memory.unit_stores[units], memory.stores[0].shape[2]
        return launch_top_blocks(
            q, store, sets=sets, tokens=tokens, leftpad=step.places[LEFTPAD],
            used=step.places[USED], **settings,
        )  # fmt: skip

    return choose


def read_blocks(
    memory: UnitsLayer, q: Tensor, indices: Tensor, places: Tensor, block: int, scale: float
) -> Tensor:
    """Attend with the queries of a recorded step [B 1 H D] to chosen blocks, by launches alone."""
    from bitnet_triton.kernels.selected_blocks.decode import launch_selected_decode

    keys, values = (store.transpose(1, 2) for store in memory.stores)
    return launch_selected_decode(
        q, keys, values, indices, block=block, scale=scale, leftpad=places[LEFTPAD],
        seqused=places[USED],
    )[0]  # fmt: skip


def _attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block: int, rows: Rows,
    context: AttentionContext,
) -> Tensor:  # fmt: skip
    """Attend to blocks [B Tq sets S], sets for the heads of keys, or for those of queries."""
    group = q.shape[2] // k.shape[2]
    if indices.shape[2] != k.shape[2]:
        # heads of queries that share keys go apart, each beside those of other groups
        parts = [
            _attend(q[:, :, g::group], k, v, indices[:, :, g::group], block, rows, context)
            for g in range(group)
        ]
        return torch.stack(parts, dim=3).flatten(2, 3)
    out: Any
    if rows.starts is None:
        out = selected_block_attention(
            q, k, v, indices, block=block, scale=context.scale, leftpad=rows.leftpad
        )
        return out
    out = selected_block_attention(
        *(t.flatten(0, 1) for t in (q, k, v, indices)),
        block=block, scale=context.scale, cu_seqlens=rows.starts,
    )  # fmt: skip
    return out.unflatten(0, q.shape[:2])


def _dense(q: Tensor, k: Tensor, v: Tensor, rows: Rows, context: AttentionContext) -> Tensor:
    out: Any
    if rows.starts is None:
        out = flash_attention(q, k, v, scale=context.scale, leftpad_k=rows.leftpad)
        return out
    out = flash_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale=context.scale,
        cu_seqlens_q=rows.starts, cu_seqlens_k=rows.starts,
    )  # fmt: skip
    return out.unflatten(0, q.shape[:2])


def _positions(q: Tensor, rows: Rows) -> Tensor:
    """Return the position of each query [B or 1, Tq] in its text."""
    Tq = q.shape[1]
    if rows.starts is not None:
        place = torch.arange(q.shape[0] * Tq, device=q.device)
        text = torch.searchsorted(rows.starts[1:].contiguous(), place, right=True)
        return (place - rows.starts[text]).unflatten(0, (q.shape[0], Tq))
    column = torch.arange(rows.tokens - Tq, rows.tokens, device=q.device)[None]
    return column if rows.leftpad is None else column - rows.leftpad[:, None]
