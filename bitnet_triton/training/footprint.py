"""What attention really reads and what a cache really holds.

Neither is taken from the name of a mode or from its settings. A mode that chooses by what its
memory keeps counts its choice itself (``Mode.reads``). Any other one is tried out: a key's value is
read if it shows in the output when it alone is not zero; a key is scored if the output changes when
the key is made the best one. Memory is what the tensors occupy that a layer of the cache holds
(``Memory.tensors``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitnet_triton.attention import Reads, hub
from bitnet_triton.cache import Memory
from bitnet_triton.cache.memory import tensors_in
from bitnet_triton.models.rotary import depends_on_length

_TRIED = 32  # keys of a layer that are made the best one, to estimate how many are scored
_SPREAD = 60.0  # of the scores of a query, in nats

_Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Footprint:
    """What one query reads and one sequence holds, at some length.

    Attributes:
        rows_prompt: keys whose values the last token of a prompt reads: mean over layers and heads.
        rows_decode: the same, of a generated token.
        scored_decode: keys that a generated token compares with, estimated from some of them.
        cache_bytes: of one sequence, in all layers, room to spare included.
    """

    rows_prompt: float
    rows_decode: float
    scored_decode: float
    cache_bytes: int


@dataclass
class _Counts:
    rows: list[float] = field(default_factory=list)
    scored: list[float] = field(default_factory=list)


def measure_footprint(model: Any, ids: Tensor, cache: Any = None) -> Footprint:
    """Count what ``model`` reads and holds after ``ids`` [1 T].

    Args:
        model: a ``BitNetForCausalLM``, best not fused.
        ids: int64 [1 T]; the token before the last one is a prompt's, the last one is generated.
        cache: an empty one. Default: what the attention asks for.
    """
    T = ids.shape[1]
    phase = {} if model.attention_plan is None else {"prompt_len": T - 1}
    with torch.no_grad():
        known = {"context_length": ids.shape[1]} if depends_on_length(model) else {}
        output = model(
            ids[:, :-2], past_key_values=cache, use_cache=True, logits_to_keep=1, **known
        )
        cache = output.past_key_values
        with _counting() as prompt:
            model(ids[:, -2:-1], past_key_values=cache, use_cache=True)
        with _counting() as decode:
            model(ids[:, -1:], past_key_values=cache, use_cache=True, **phase)
    return Footprint(
        _mean(prompt.rows), _mean(decode.rows), _mean(decode.scored), bytes_held(cache)
    )


def bytes_held(cache: Any) -> int:
    """Return the bytes of all tensors in the layers of a cache; shared memory counts once."""
    found: dict[tuple[Any, int], int] = {}
    for layer in cache.layers:
        held = layer.tensors() if isinstance(layer, Memory) else tensors_in(vars(layer))
        for tensor in held:
            storage = tensor.untyped_storage()
            found[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@contextmanager
def _counting() -> Iterator[_Counts]:
    """Watch the attention function of this package while the block runs."""
    attend, counts = ALL_ATTENTION_FUNCTIONS[hub.NAME], _Counts()

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):  # noqa: ANN202
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(module, q, k, v, *args, **kwargs)[0][:, -1]  # [B H D]

        out = attend(module, query, key, value, *args, **kwargs)
        counted = hub.count(module, query, key, value, *args, **kwargs)
        if counted is None:
            read = _rows_read(run, _calmed(query, key, kwargs.get("scaling")), key, value)
            # what is read has been scored, whether or not it was tried
            counted = Reads(read, max(read, _keys_scored(run, query, key, value)))
        counts.rows.append(counted.rows)
        counts.scored.append(counted.scored)
        return out

    AttentionInterface.register(hub.NAME, watched)
    try:
        yield counts
    finally:
        AttentionInterface.register(hub.NAME, attend)


def _calmed(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """Return queries [B H Tq D] whose scores differ by no more than float32 tells from zero weight.

    Sharp heads have weights of less than 1e-38, which are zeros, for keys that they read all the
    same. A positive factor for each head keeps the order of the scores.
    """
    k = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (k @ query[:, :, -1:].transpose(2, 3))[..., 0].float()  # [B H Tk]
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    spread = scores.amax(-1) - scores.amin(-1)
    return query * (_SPREAD / spread.clamp_min(_SPREAD))[..., None, None].to(query.dtype)


def _rows_read(run: _Run, query: Tensor, key: Tensor, value: Tensor) -> float:
    """Return of how many keys [B H Tk D] the values reach the output, as a mean over heads.

    The values are replaced by rows of the unit matrix, as many at once as a head has entries: each
    entry of the output is then the weight of one key.
    """
    Tk, D = value.shape[-2:]
    unit = torch.eye(D, dtype=value.dtype, device=value.device)
    read = 0.0
    for start in range(0, Tk, D):
        size = min(D, Tk - start)
        probe = torch.zeros_like(value)
        probe[:, :, start : start + size] = unit[:size]
        read += (run(query, key, probe) != 0).sum(-1).float().mean().item()
    return read


def _keys_scored(run: _Run, query: Tensor, key: Tensor, value: Tensor) -> float:
    """Estimate with how many keys the last query [B H Tq D] is compared, as a mean over heads."""
    Tk, groups = key.shape[2], query.shape[1] // key.shape[1]
    first = query[:, ::groups, -1]  # of the heads that share a key, the first one
    best = 1e3 * first / first.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    marked = torch.ones_like(value[:, :, 0])
    generator = torch.Generator().manual_seed(0)
    tried = torch.randperm(Tk, generator=generator)[:_TRIED].tolist()
    hits = 0.0
    for index in tried:
        k, v = key.clone(), torch.zeros_like(value)
        k[:, :, index], v[:, :, index] = best, marked
        # the best key takes all of the weight, so the output is its value, or nothing at all
        hits += (run(query, k, v)[:, ::groups, 0] > 0.5).float().mean().item()
    return Tk * hits / len(tried)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
