"""Does a cache that somebody hands over keep what the attention of a model reads?

A cache made by another model, or before ``set_attention``, may lack tokens that are read now, or
hold them where nobody looks for them. Nothing would fail then, and the text would be another one.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.attention.mode import Kept, Mode
from bitnet_triton.cache import Memory


def check_served(cache: Cache, plan: AttentionPlan | None) -> None:
    """Raise where a layer of a cache does not hold what a model reads.

    Args:
        cache: with layers of ours or of transformers: those that ``config.layer_types`` or
            ``config.sliding_window`` lead to drop what has left their window.
        plan: the modes of the model; None: nobody reads more than keys.

    Raises:
        ValueError: a layer drops tokens that are read, keeps others in each head where a mode goes
            by the places of keys, or has counted positions that the model does not.
    """
    for i, layer in enumerate(cache.layers):
        objection = served_objection(i, layer, plan)
        if objection is not None:
            raise ValueError(f"`past_key_values`: {objection}")


def served_objection(index: int, layer: Any, plan: AttentionPlan | None) -> str | None:
    """Say what a layer lacks of what a model reads there; None where nothing."""
    if plan is None:
        if isinstance(layer, Memory) and not (layer.keeps_places and layer.kept_window is None):
            return (
                f"{type(layer).__name__} goes with `config.attention`; choose one, as by "
                "bitnet_triton.set_attention(model, 'full')"
            )
        return None
    modes = plan.modes(index)
    if not all(mode.reads_keys for mode in modes):
        return None
    if isinstance(layer, Memory):
        for mode in modes:
            if not (layer.keeps_places or layer.is_paged or mode.reads_any_rows):
                return (
                    f"layer {index} is a {type(layer).__name__}, whose slots do not tell which "
                    f"token they hold; attention {mode.name!r} goes by the places of keys"
                )
        if layer.shift is not None and not plan.counts_positions:
            return (
                f"layer {index} has counted positions anew, the attention of the model goes by "
                "those of the text; start with an empty cache"
            )
    return _window_objection(index, layer, modes)


def _window_objection(index: int, layer: Any, modes: tuple[Mode, ...]) -> str | None:
    held = None
    if isinstance(layer, Memory):
        held = None if layer.kept_window is None else Kept(*layer.kept_window)
    elif getattr(layer, "is_sliding", False):
        held = Kept(layer.get_max_length() - 1)  # beside the query's own
    if held is None:
        return None
    prefill, decode = (mode.kept for mode in modes)
    needed = None if prefill is None or decode is None else prefill | decode
    if needed is not None and needed.recent <= held.recent and needed.sinks <= held.sinks:
        return None
    wanted = "everything" if needed is None else _words(needed)
    return (
        f"layer {index} keeps {_words(held)}, its attention reads {wanted}; leave the cache out, "
        "or use one that keeps as much"
    )


def _words(kept: Kept) -> str:
    first = f" and {kept.sinks} of the first" if kept.sinks else ""
    return f"{kept.recent} of the latest{first} tokens"
