"""A mask function of transformers that describes masks in a few numbers, where that can be done.

transformers hands over a function of two indices and a mask of padding. Three such functions are
known here: causal, causal with a window, and either of them within packed sequences; and one that
shows everything. Their masks become ``Tokens``. Anything else, and padding with tokens on both
sides, becomes the matrix that transformers makes for PyTorch's attention.

While a graph is traced, neither values nor closures can be looked at. Padding becomes the matrix
then. Packed sequences and windows are told by asking the function about a few pairs of each row;
the graph checks as it runs that the answers are those of such a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import masking_utils as hf

from bitnet_triton.attention.tokens import Tokens, padding_of, starts_of


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = hf.causal_mask_function,
    attention_mask: Tokens | Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tokens | Tensor:
    """Describe a mask; the arguments are those of transformers' mask functions."""
    if isinstance(attention_mask, Tokens):
        return attention_mask  # finished before: ``generate`` prepares masks for static caches
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts in place, before its layers attend
    by_user = kwargs.get("use_vmap") or allow_is_bidirectional_skip
    if not by_user and _is_traced_packing(
        mask_function, attention_mask, q_length, kv_length, q_offset
    ):
        size = (batch_size, q_length)
        return _described_by_asking(mask_function, size, local_size, kwargs.get("device"))
    tokens = _describe(mask_function, attention_mask, q_length, q_offset, local_size)
    if tokens is not None:
        may_skip = allow_is_causal_skip if tokens.causal else allow_is_bidirectional_skip
        # a model that forbids the shortcut wants to look into the matrix; transformers forbids it
        # for packed sequences and for steps in a static cache as well
        if may_skip or tokens.cu_seqlens is not None or q_length == 1:
            return tokens
    offset = cast("int", q_offset)
    matrix = hf.sdpa_mask(
        batch_size, q_length, kv_length, offset, kv_offset, mask_function, attention_mask,
        local_size, allow_is_causal_skip=False, **kwargs,
    )  # fmt: skip
    assert matrix is not None
    return matrix


def _describe(
    mask_function: Callable,
    padding: Tensor | None,
    Tq: int,
    offset: int | Tensor,
    window: int | None,
) -> Tokens | None:
    known, cu_seqlens = _known(mask_function, window), None
    if known is None and padding is None:
        known, cu_seqlens = _packed(mask_function, window)
    if known is None:
        return None
    left = used_q = None
    if padding is not None:
        if torch.compiler.is_compiling():
            return None  # to look at its values would break the graph
        columns = int(offset) + Tq
        described = padding_of(padding[:, :columns], Tq) if padding.shape[1] >= columns else None
        if described is None:
            return None
        left, used_q = described
    if not known["causal"] and (left is not None or used_q is not None):
        return None  # with queries on both sides of a key, its place cannot be told from the end
    return Tokens(offset=offset, leftpad=left, used_q=used_q, cu_seqlens=cu_seqlens, **known)


def _known(function: Callable, window: int | None) -> dict[str, Any] | None:
    """Return the fields of ``Tokens`` that say what ``function`` shows."""
    if function is hf.causal_mask_function:
        return {"causal": True}
    if function is hf.bidirectional_mask_function:
        return {"causal": False}
    if window is None or torch.compiler.is_compiling():
        return None  # closures cannot be looked into while a graph is traced
    if _same(function, hf.sliding_window_causal_mask_function(window)):
        return {"causal": True, "window": window}
    return None


def _packed(function: Callable, window: int | None) -> tuple[dict[str, Any] | None, Tensor | None]:
    """Return the fields and the starts of packed sequences, if that is what ``function`` says."""
    if torch.compiler.is_compiling():
        return None, None
    parts = _captured(function).get("mask_functions", ())
    found = [_captured(part).get("packed_sequence_mask") for part in parts]
    ids = next((value for value in found if value is not None), None)
    if ids is None:
        return None, None
    for inner, expected in _packings(parts, ids):
        known = _known(inner, window)
        if known is not None and _same(function, expected):
            return known, starts_of(ids[:, 1:] != ids[:, :-1])
    return None, None


def _is_traced_packing(
    function: Callable, padding: Tensor | None, Tq: int, Tk: int, offset: int | Tensor
) -> bool:
    """Tell whether a graph is traced in which ``function`` joins masks of one whole text a row.

    transformers builds such joints for packed sequences, which it cannot rule out while a graph is
    traced, for windows and for chunks. Joints of users come with ``use_vmap``.
    """
    if not torch.compiler.is_compiling() or padding is not None or Tq != Tk:
        return False
    joint = getattr(function, "__code__", None) is hf.and_masks(hf.causal_mask_function).__code__
    return joint and isinstance(offset, int) and offset == 0


def _described_by_asking(
    sees: Callable, size: tuple[int, int], window: int | None, device: Any
) -> Tokens:
    """Describe a joint of masks by what it says about neighbours, whatever their values are.

    A text starts where a token does not see the one before it. Each row of the matrix must then be
    an interval from there, or from the window's edge, up to its own token; the graph asks about the
    pairs at both ends of it and raises RuntimeError where they say otherwise.
    """
    B, T = size
    row = torch.arange(B, device=device)[:, None]
    place = torch.arange(T, device=device).expand(B, T)
    head = torch.zeros_like(row)
    before, behind = (place - 1).clamp_min(0), (place + 1).clamp_max(T - 1)

    is_first = ~sees(row, head, place, before) | (place == 0)
    start = torch.where(is_first, place, 0).cummax(-1).values
    low = start if window is None else torch.maximum(start, place - window + 1)
    is_interval = (
        sees(row, head, place, low)
        & sees(row, head, place, place)
        & ((low == 0) | ~sees(row, head, place, (low - 1).clamp_min(0)))
        & ((behind == place) | ~sees(row, head, place, behind))
    )
    torch._assert_async(is_interval.all(), "`attention_mask`: not that of packed sequences")

    # as many places as there could be texts: those behind the last one are empty
    count = B * T
    first = is_first.flatten()
    at = torch.where(first, first.cumsum(0) - 1, count)
    starts = torch.full((count + 1,), count, dtype=torch.int32, device=device)
    index = torch.arange(count, dtype=torch.int32, device=device)
    # the last place belongs to the number of tokens, which the others write there
    values = torch.where(first, index, count)
    return Tokens(window=window, cu_seqlens=starts.scatter(0, at, values))


def _packings(parts: Sequence[Callable], ids: Tensor) -> Iterator[tuple[Callable, Callable]]:
    """Yield what is packed, and its packing, as each version of transformers writes it."""
    is_member = hf.packed_sequence_mask_function(ids)
    yield parts[0], hf.and_masks(parts[0], is_member)  # up to 5.17: by columns
    inner = _captured(parts[-1])
    if "mask_function" in inner and "position_ids" in inner:  # later: by positions
        moved = hf.remap_positions_for_packed_sequence(**inner)
        yield inner["mask_function"], hf.and_masks(is_member, moved)


def _captured(function: Callable) -> dict[str, Any]:
    """Return what a closure has captured, by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells)}


def _same(a: Any, b: Any) -> bool:
    """Tell whether two values are equal, functions by their code and what they have captured."""
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    if not callable(a) or isinstance(a, Tensor):
        return a is b or (not isinstance(a, Tensor) and type(a) is type(b) and a == b)
    if getattr(a, "__code__", None) is not getattr(b, "__code__", None):
        return False
    one, other = _captured(a), _captured(b)
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
