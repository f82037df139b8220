"""The public choice of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_device, check_dtype, check_shape, check_tensor
from bitnet_triton.kernels.common.lengths import in_a_row
from bitnet_triton.kernels.top_blocks.reference import rounded_queries, top_blocks_reference
from bitnet_triton.kernels.top_blocks.units import Units
from bitnet_triton.runtime import Implementation, cdiv, register_op, select
from bitnet_triton.runtime.device import smallest_dot

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD = 256
# of integer products on a GPU
_SMALLEST_CODED, _LARGEST_CODED = 32, 128
_TOKENS = Units()


@dataclass(frozen=True, eq=False)
class Choice:
    """What ``top_blocks`` is asked for besides queries and keys."""

    units: Units
    block: int
    selected: int
    initial: int
    local: int
    sets: int
    tokens: int
    scale: Tensor | None = None
    leftpad: Tensor | None = None
    used: Tensor | None = None
    starts: Tensor | None = None

    def flatten(self) -> tuple:
        """Return the parts that ``build`` takes."""
        u = self.units
        return (
            u.kind, u.stride, u.window, self.block, self.selected, self.initial, self.local,
            self.sets, self.tokens, self.scale, self.leftpad, self.used, self.starts,
        )  # fmt: skip

    @classmethod
    def build(  # noqa: PLR0913 - the parts of the registered op
        cls, kind: str, stride: int, window: int, block: int, selected: int, initial: int,
        local: int, sets: int, tokens: int, scale: Tensor | None, leftpad: Tensor | None,
        used: Tensor | None, starts: Tensor | None,
    ) -> Choice:  # fmt: skip
        """Make it again of its parts."""
        units = Units(kind, stride, window)  # type: ignore[arg-type]
        return cls(
            units, block, selected, initial, local, sets, tokens, scale, leftpad, used, starts
        )


def _triton_top(q: Tensor, keys: Tensor, choice: Choice) -> Tensor:
    # Triton is imported on first use: that takes longer than this package
    from bitnet_triton.kernels.top_blocks.forward import launch_top_blocks
    from bitnet_triton.kernels.top_blocks.long_lists import launch_top_blocks_long, prefers_numbers

    q, keys = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, keys))
    settings = dict(vars(choice))
    if smallest_dot(q.device) == 1 and settings["starts"] is None:
        rows = q.shape[1] * (choice.sets // keys.shape[2])
        blocks = cdiv(choice.tokens, choice.block)
        if prefers_numbers(rows, choice.selected, blocks):
            del settings["starts"]
            return launch_top_blocks_long(q, keys, **settings)
    return launch_top_blocks(q, keys, **settings)


def choice_objection(q: Tensor, keys: Tensor) -> str | None:
    """Say why no kernel chooses for queries [B Tq H D] by such keys; None when one does."""
    D, least = q.shape[-1], smallest_dot(q.device)
    if not least <= D <= _LARGEST_HEAD:
        return f"heads of {D} values; up to {_LARGEST_HEAD} run, on a GPU from {least}"
    # in float32 and beyond these sizes registers would spill
    fits = _SMALLEST_CODED <= D <= _LARGEST_CODED and q.dtype != torch.float32
    if least > 1 and keys.dtype == torch.int8 and not fits:
        sizes = f"{_SMALLEST_CODED} up to {_LARGEST_CODED}"
        return f"codes on a GPU: for queries of 16 bits and of {sizes} values"
    return None


def _reference_top(q: Tensor, keys: Tensor, choice: Choice) -> Tensor:
    if choice.scale is not None:
        q = rounded_queries(q, choice.sets)
        keys = keys.float() * choice.scale[..., None]
    settings = {n: getattr(choice, n) for n in ("units", "block", "selected", "initial", "local")}
    chosen = q.new_full((*q.shape[:2], choice.sets, choice.selected), -1, dtype=torch.int32)
    for b, rows, first, end in _sequences(q, choice):
        chosen[b, rows] = top_blocks_reference(
            q[b, rows], keys[b], sets=choice.sets, tokens=end, leftpad=first, **settings
        )  # fmt: skip
    return chosen


def _sequences(q: Tensor, choice: Choice) -> list[tuple[int, slice, int, int]]:
    """Return for each sequence its row of the batch, its queries, its first column, and its end."""
    if choice.starts is not None:
        starts = choice.starts.tolist()
        return [(0, slice(a, e), a, e) for a, e in pairwise(starts) if e > a]
    B, tokens = q.shape[0], choice.tokens
    left = [0] * B if choice.leftpad is None else choice.leftpad.tolist()
    end = [tokens] * B if choice.used is None else [min(n, tokens) for n in choice.used.tolist()]
    return [(b, slice(None), left[b], end[b]) for b in range(B)]


def _launch_top(q: Tensor, keys: Tensor, choice: Choice) -> Tensor:
    if q.numel() == 0:
        return _fake_top(q, keys, choice)
    return select("top_blocks", TOP_BLOCKS, q.device, q, keys)(q, keys, choice)


def _fake_top(q: Tensor, keys: Tensor, choice: Choice) -> Tensor:
    return q.new_empty((*q.shape[:2], choice.sets, choice.selected), dtype=torch.int32)


TOP_BLOCKS = {
    "triton": Implementation(_triton_top, choice_objection),
    "reference": Implementation(_reference_top),
}
_top_blocks = register_op("top_blocks", _launch_top, _fake_top, bundle=Choice)


def top_blocks(  # noqa: PLR0913 - what the units are, which are chosen, and where rows lie
    q: Tensor,
    keys: Tensor,
    *,
    block: int,
    selected: int,
    units: Units = _TOKENS,
    initial: int = 1,
    local: int = 1,
    sets: int | None = None,
    tokens: int | None = None,
    scale: Tensor | None = None,
    leftpad: Tensor | None = None,
    seqused: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Choose the blocks of keys that each token reads: those with the best unit.

    The score of block j for a token is the largest product of its query with a unit of the block
    that ends before or at the token; neither scaled nor exponentiated, since only the order counts.
    A set of heads is scored as their sum. The first and the last blocks are chosen always, the
    token's own one among the latter; future ones never; of equal ones the earlier. Of units of
    bounds the score is the sum over channels of max(q max, q min), an upper bound of the product
    with any key between (Quest, arXiv:2406.10774). A score that is no number is none. The matrix of
    scores is never written; for long lists on a CPU that of some queries at a time is.

    Args:
        q: [B Tq H D] float16, bfloat16 or float32, the last Tq tokens; packed: [sum T, H, D].
        keys: [B U Hu D], of bounds [B U Hu 2 D], stored as ``Units`` says, in the dtype of ``q``,
            or int8 with ``scale``; packed: [U Hu D]. ``pool_keys`` makes those of windows.
        block: tokens of a block, a multiple of the stride of the units.
        selected: blocks of a token, those that are chosen always included.
        units: what the keys are. Default: the tokens' own.
        initial: how many first blocks are chosen always.
        local: how many last ones, the own block included.
        sets: how many sets of blocks a token has, each of H / sets neighbouring heads; a multiple
            of Hu. Default: H, a set for each head.
        tokens: columns up to the last query, padding included; rows of ``keys`` beyond them do
            not count. Default: Tq.
        scale: float32 [B U Hu], what codes are multiplied by; packed: [U Hu]. Each query is rounded
            to 127 steps of its largest entry then, so that products are those of integers.
        leftpad: int32 [B], columns of padding in front; blocks count from the first token.
        seqused: int32 [B], columns up to the last query of each row; at most ``tokens``.
        cu_seqlens: int32 [B + 1], where packed sequences start; queries and keys are the same
            tokens, and blocks count from the start of each sequence.

    Returns:
        int32 [B Tq sets selected], packed [sum T, sets, selected]: blocks in order, -1 behind them.
        Not differentiable.

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, a number is out of range, or packed sequences come with
            ``leftpad``, ``seqused`` or ``tokens``.
        BackendUnavailableError: the forced backend cannot run.
    """
    q, keys, scale = (None if t is None else t.detach() for t in (q, keys, scale))  # type: ignore
    if cu_seqlens is not None:
        if leftpad is not None or seqused is not None or tokens is not None:
            raise ValueError("`cu_seqlens`: goes without `leftpad`, `seqused` and `tokens`")
        q, keys = q[None], keys[None]
        scale = None if scale is None else scale[None]
    check_tensor("q", q)
    check_dtype("q", q, *FLOATS)
    check_shape("q", q, "B T H D")
    B, _, H = q.shape[:3]
    tokens = q.shape[1] if tokens is None else tokens
    sets = H if sets is None else sets
    _check_numbers(block, selected, units, initial, local)
    _check_keys(q, keys, scale, units, sets, tokens)
    for name, t in (("leftpad", leftpad), ("seqused", seqused), ("cu_seqlens", cu_seqlens)):
        if t is not None:
            check_dtype(name, t, torch.int32)
            check_device(name, t, q.device)
            if name != "cu_seqlens":
                check_shape(name, t, "B", B=B)
    leftpad, seqused, cu_seqlens = map(in_a_row, (leftpad, seqused, cu_seqlens))
    choice = Choice(
        units, block, selected, initial, local, sets, tokens, scale, leftpad, seqused, cu_seqlens
    )
    chosen = _top_blocks(q, keys, choice)
    return chosen if cu_seqlens is None else chosen[0]


def _check_numbers(block: int, selected: int, units: Units, initial: int, local: int) -> None:
    if block < 1 or block % units.stride:
        raise ValueError(
            f"`block`: expected a multiple of the units' stride {units.stride}, got {block}"
        )
    if initial < 0 or local < 1:
        raise ValueError(
            f"`initial`, `local`: expected at least 0 and 1, got {initial} and {local}"
        )
    if selected < initial + local:
        raise ValueError(
            f"`selected`: expected at least initial + local = {initial + local}, got {selected}"
        )


def _check_keys(
    q: Tensor, keys: Tensor, scale: Tensor | None, units: Units, sets: int, tokens: int
) -> None:
    (B, Tq, H, D), least = q.shape, units.rows(tokens)
    check_tensor("keys", keys)
    check_dtype("keys", keys, q.dtype if scale is None else torch.int8)
    check_device("keys", keys, q.device)
    check_shape("keys", keys, "B U Hu D", B=B, D=units.width(D))
    if tokens < Tq:
        raise ValueError(f"`tokens`: expected at least Tq={Tq}, got {tokens}")
    if keys.shape[1] < least:
        raise ValueError(f"`keys`: expected at least {least} units, got {keys.shape[1]}")
    if sets < 1 or H % sets or sets % max(keys.shape[2], 1):
        raise ValueError(
            f"`sets`: expected a divisor of H={H} and a multiple of Hu={keys.shape[2]}, got {sets}"
        )
    if scale is not None:
        check_dtype("scale", scale, torch.float32)
        check_shape("scale", scale, "B U Hu", B=B, U=keys.shape[1], Hu=keys.shape[2])
        if units.kind == "bounds":
            raise ValueError("`scale`: units of bounds are no codes")
