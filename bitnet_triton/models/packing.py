"""Texts packed into one row: positions start again, and no mask of ones or cache hides that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bitnet_triton.attention.tokens import find_texts


def follow_packing(
    attention_mask: Any, position_ids: Tensor | None, cache: Cache | None, use_cache: bool | None
) -> tuple[Any, bool | None]:
    """Return the mask and ``use_cache`` of a call with which transformers sees its packed texts.

    transformers looks for packed texts only where there is neither a mask nor a cache, and lets
    them see each other otherwise. A mask that hides nothing in front of a token says nothing that
    positions do not, and what a cache holds of packed texts nobody can continue.

    Looks at the values of positions, so it waits for the device, once a prompt; while a graph is
    traced, nothing is changed.

    Args:
        attention_mask: [B T] or whatever the model takes.
        position_ids: [B T] or [1 T].
        cache: what the caller has given.
        use_cache: what the caller has asked for; None: nothing.

    Raises:
        ValueError: a text starts in the middle of a row, and there is a cache, or padding in front.
    """
    unchanged = attention_mask, use_cache
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return unchanged
    if torch.compiler.is_compiling():
        return unchanged
    is_token = None
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            return unchanged
        is_token = attention_mask[:, -position_ids.shape[1] :].bool()
    is_packed, has_padding_in_front = find_texts(position_ids, is_token)
    if not is_packed:
        return unchanged
    if cache is not None or use_cache:
        raise ValueError("`position_ids`: packed sequences go without a cache")
    if has_padding_in_front:
        raise ValueError("`attention_mask`: packed sequences have padding behind them only")
    return None, False
