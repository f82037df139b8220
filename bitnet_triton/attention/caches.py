"""The cache that a plan needs: each layer keeps what its modes can still see."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from bitnet_triton.attention.plan import AttentionPlan
from bitnet_triton.attention.streaming import Streaming
from bitnet_triton.cache import GrowingLayer, SinkWindowLayer, StreamingLayer

# Streaming positions start again after so many tokens: angles in float32 stay exact, keys are
# turned rarely, and each key at most once more than it would be in any case
REBASE_EVERY = 4096


def build_cache(plan: AttentionPlan | None, layers: int, offloading: bool = False) -> Cache:
    """Return an empty cache for ``generate`` and ``forward``.

    Args:
        plan: the modes of the model; None: full attention.
        layers: how many layers the model has.
        offloading: keep layers that hold everything in the memory of the CPU.
    """
    return Cache([_layer(plan, i) for i in range(layers)], offloading=offloading)


def _layer(plan: AttentionPlan | None, index: int) -> CacheLayerMixin:
    kept = None if plan is None else plan.kept(index)
    if plan is None or kept is None:
        return GrowingLayer()
    # only if all layers agree can positions start again: they are the same in all layers
    kind = StreamingLayer if plan.uses_only(Streaming) else SinkWindowLayer
    return kind(kept.recent, kept.sinks)


def tell_padding(cache: Cache, leftpad: Tensor | None) -> None:
    """Tell the layers that drop tokens where the padding to the left ends, int32 [B]."""
    for layer in cache.layers:
        if isinstance(layer, SinkWindowLayer):
            layer.leftpad = leftpad


def bound_positions(cache: Cache, frequencies: Tensor) -> Tensor | None:
    """Let the positions of a stream start again if it is time to.

    Args:
        cache: of a model whose layers all stream, or any other one.
        frequencies: [D / 2], angles of the rotary embedding for each position.

    Returns:
        int64 [B], how far rotary positions lag behind those of the text; None: not at all.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, StreamingLayer)]
    if not layers or len(layers) < len(cache.layers):
        return None
    most = max(layer.kept for layer in layers)
    if layers[0].columns - layers[0].columns_at_rebase >= max(REBASE_EVERY, most):
        for layer in layers:
            layer.rebase(most + 1, frequencies)
    return layers[0].shift
