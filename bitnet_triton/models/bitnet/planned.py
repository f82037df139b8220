"""What a model with an attention plan does around transformers' own forward and ``generate``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask

from bitnet_triton.attention import AttentionPlan, hub
from bitnet_triton.attention.tokens import Tokens
from bitnet_triton.cache import Call, GrowingLayer, Memory, begin_call, parse_memory
from bitnet_triton.cache.memory import tensors_in
from bitnet_triton.models.bitnet.reversible import check_no_cache
from bitnet_triton.models.cache_checks import check_served
from bitnet_triton.models.rotary import Frequencies


def describe_call(
    model: Any,
    x: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Cache | None,
    *,
    prompt_len: int | Tensor | None,
    is_answer: Tensor | None,
    chosen: Frequencies | None = None,
) -> tuple[Any, Tensor | None, dict[str, Any]]:
    """Describe a call to the attention layers, and to the cache.

    Args:
        model: the decoder, with ``attention_plan``, ``config`` and ``rotary_emb``.
        x: ids [B T] or embeddings [B T D].
        attention_mask: as the model got it.
        position_ids: as the model got them.
        cache: the cache of the call, or None.
        prompt_len: as the model got it.
        is_answer: bool [B T], tokens with labels; None: there are no labels.
        chosen: frequencies of this call, where they depend on the length of a text.

    Returns:
        The mask, the positions, and further arguments for the attention layers.
    """
    plan, (B, T) = model.attention_plan, x.shape[:2]
    check_attention_implementation(model.config._attn_implementation)
    if cache is not None:
        check_served(cache, plan)
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=torch.empty(B, T, 0, dtype=model.dtype, device=x.device),
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    leftpad = mask.leftpad if isinstance(mask, Tokens) else None
    offset = 0 if cache is None else cache.get_seq_length()
    prompt_len = resolve_prompt_len(prompt_len, is_answer, mask, B, offset)
    frequencies, rotary_scale = model.rotary_emb.inv_freq, model.rotary_emb.attention_scaling
    if chosen is not None:
        # modes that rotate by themselves refuse rows that turn differently
        frequencies, rotary_scale = chosen.shared()
    more: dict[str, Any] = {
        "prompt_len": prompt_len,
        "frequencies": frequencies,
        "rotary_scale": rotary_scale,
    }
    shift = None
    if cache is not None:
        call = Call(offset, leftpad, frequencies=frequencies, prompt_len=prompt_len)
        shift = begin_call(cache.layers, call)
    if not plan.counts_positions:
        return mask, position_ids, more
    if position_ids is not None:
        names = ", ".join(repr(mode.name) for mode in dict.fromkeys(plan) if mode.counts_positions)
        raise ValueError(f"`position_ids`: attention {names} counts positions itself")
    position_ids = (torch.arange(T, device=x.device) + offset)[None]
    for lag in (leftpad, shift):
        position_ids = position_ids if lag is None else position_ids - lag[:, None]
    return mask, position_ids.clamp_min(0), more


def read_again(model: Any, cache: Cache | None, input_ids: Tensor | None) -> None:
    """Read the tokens [B T] of a call that has run once more, where memories ask for it.

    Args:
        model: the decoder, whose forward is called.
        cache: the cache of the call, or None.
        input_ids: as the model got them.

    Raises:
        ValueError: the call had embeddings instead of ids, which cannot be asked to be repeated.
    """
    layers: list[Any] = [] if cache is None else cache.layers
    asking = [layer for layer in layers if isinstance(layer, Memory) and layer.wants_again]
    if not asking:
        return
    if input_ids is None:
        raise ValueError(
            f"`inputs_embeds`: {type(asking[0]).__name__} has a prompt read again, which needs "
            "`input_ids`"
        )
    assert cache is not None
    others = [i for i, layer in enumerate(layers) if not any(layer is each for each in asking)]
    for memory in asking:
        memory.begin_again()
    with torch.no_grad():
        for part in asking[0].read_again(input_ids):
            with _left_alone(cache, others):
                model.forward(input_ids=part, past_key_values=cache, use_cache=True)
    for memory in asking:
        memory.end_again()


@contextmanager
def _left_alone(cache: Cache, places: list[int]) -> Iterator[None]:
    """Let copies of some layers, which keep a window, take in what is read meanwhile."""
    kept = {i: cache.layers[i] for i in places}
    for i, layer in kept.items():
        held = layer.tensors() if isinstance(layer, Memory) else tensors_in(vars(layer))
        # a deep copy of a tensor that has a graph is refused
        cache.layers[i] = copy.deepcopy(layer, {id(t): t.detach().clone() for t in held})
    try:
        yield
    finally:
        for i, layer in kept.items():
            cache.layers[i] = layer


def prepared_cache(model: Any, cache: Cache | None, use_cache: bool | None) -> Cache | None:
    """Return the cache of a call: the one that is given, or a fresh one if one is wanted.

    ``model`` is the one with ``attention_plan``, with or without a head.
    """
    check_no_cache(model.config, cache, use_cache)
    if cache is not None:
        if model.attention_plan is None:
            check_served(cache, None)
        return cache
    wanted = model.config.use_cache if use_cache is None else use_cache
    if not wanted or (model.base_model.gradient_checkpointing and model.training):
        return None
    return build_cache(model.attention_plan, model.config.num_hidden_layers)


def replace_dynamic_cache(
    plan: AttentionPlan | None, layers: int, model_kwargs: dict[str, Any], is_assistant: bool
) -> None:
    """Put a cache of ours where ``generate`` has just made a dynamic one of its own."""
    made = model_kwargs.get("past_key_values")
    if type(made) is not DynamicCache:
        return  # static and quantised caches keep everything, which every mode can use
    cache = build_cache(plan, layers, offloading=made.offloading)
    if is_assistant:
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache


def check_chunks(cache: Cache | None, size: int | None) -> None:
    """Raise where a memory would compress none of the parts in which a prompt is read."""
    layers: list[Any] = [] if cache is None else cache.layers
    for layer in layers:
        if isinstance(layer, Memory) and size and size <= layer.least:
            raise ValueError(
                f"`prefill_chunk_size`: {type(layer).__name__} compresses calls of more than "
                f"{layer.least} tokens, expected larger chunks, got {size}"
            )


def check_attention_implementation(name: Any) -> None:
    """Raise where a model with a plan is asked to attend in another way."""
    if name not in (None, hub.NAME):
        raise ValueError(
            f"`attn_implementation`: expected none beside `config.attention`, got {name!r}"
        )


def build_cache(plan: AttentionPlan | None, layers: int, offloading: bool = False) -> Cache:
    """Return an empty cache, of which each layer keeps what its modes can still see.

    Args:
        plan: the modes of the model; None: full attention.
        layers: how many layers the model has.
        offloading: keep layers that hold everything in the memory of the CPU.
    """
    memories: list[Any] = [
        GrowingLayer() if plan is None else plan.memory(i) for i in range(layers)
    ]
    for memory in memories:
        memory.join(memories)
    return Cache(memories, offloading=offloading)


def named_cache(model: Any, cache: str | Mapping[str, Any]) -> Cache:
    """Return an empty cache whose layers have a memory that is chosen by name.

    Args:
        model: the one with ``attention_plan``.
        cache: as ``config.cache`` takes it.

    Raises:
        ValueError: the model has no attention mode that could tell the memory what keys receive, or
            one that does not go with it.
    """
    plan: AttentionPlan | None = model.attention_plan
    name = parse_memory(cache).name
    if plan is None:
        raise ValueError(
            f"`cache_implementation`: {name!r} goes with `config.attention`; choose one, as by "
            "bitnet_triton.set_attention(model, 'full'), or load the model with "
            f"cache={name!r}"
        )
    layers = model.config.num_hidden_layers
    plan = AttentionPlan(plan.prefill, plan.decode, cache=parse_memory(cache))
    plan.check_layers(layers)
    return build_cache(plan, layers)


def span_of(plan: AttentionPlan | None, rope_type: str) -> int | None:
    """Return for how many tokens frequencies are chosen whatever a text has; None: by its length.

    Raises:
        ValueError: some layers count positions in their cache, others see the whole text.
    """
    if plan is None or not plan.counts_positions:
        return None
    if plan.span is None:
        name = next(mode.name for mode in plan if mode.counts_positions)
        raise ValueError(
            f"`attention`: {name!r} counts positions itself, other layers do not, and rope type "
            f"{rope_type!r} chooses frequencies by the length of a text"
        )
    return plan.span


def check_no_plan_arguments(**arguments: Any) -> None:
    """Raise where a model without a plan gets an argument that only a plan can follow."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"`{name}`: expected a model with `config.attention`")


def check_global_tokens(global_tokens: Tensor | None, plan: AttentionPlan) -> None:
    """Raise where global tokens are named and no layer looks at them."""
    if global_tokens is not None and not plan.takes_global_tokens:
        raise ValueError("`global_tokens`: expected attention 'longformer' with 'global_mask'")


def resolve_prompt_len(
    prompt_len: int | Tensor | None,
    is_answer: Tensor | None,
    mask: Any,
    B: int,
    offset: int | Tensor,
) -> int | Tensor | None:
    """Return how many columns stand before the first generated token.

    Args:
        prompt_len: as the model got it.
        is_answer: bool [B T], tokens with labels, for a call that has no ``prompt_len``.
        mask: the mask of the call.
        B: rows of the batch.
        offset: columns before the first query.

    Returns:
        A number, integers [B], or integers [S] for packed sequences; None: all tokens are a
        prompt's.
    """
    packed = mask.cu_seqlens if isinstance(mask, Tokens) else None
    if prompt_len is None:
        if is_answer is None:
            return None
        if packed is not None:
            return _before_answers(is_answer.flatten(), packed)
        rows = torch.arange(B + 1, device=is_answer.device) * is_answer.shape[1]
        return _before_answers(is_answer.flatten(), rows) + offset
    count, name = (B, "B") if packed is None else (packed.numel() - 1, "S")
    if isinstance(prompt_len, Tensor):
        if prompt_len.is_floating_point() or prompt_len.shape != (count,):
            raise ValueError(
                f"`prompt_len`: expected integers [{name}] with {name}={count}, got "
                f"{prompt_len.dtype} {list(prompt_len.shape)}"
            )
    elif not isinstance(prompt_len, int) or isinstance(prompt_len, bool):
        raise TypeError(f"`prompt_len`: expected an integer, got {type(prompt_len).__name__}")
    elif prompt_len < 0:
        raise ValueError(f"`prompt_len`: expected at least 0, got {prompt_len}")
    return prompt_len


def _before_answers(is_answer: Tensor, starts: Tensor) -> Tensor:
    """Return for each sequence of flat ``is_answer`` how many tokens stand before its first answer.

    ``starts`` [S + 1] says where the sequences begin, and how many tokens there are; one without an
    answer is a prompt as a whole.
    """
    place = torch.arange(is_answer.numel(), device=is_answer.device)
    sequence = torch.bucketize(place, starts[1:], right=True)
    ends = starts[1:].long()
    first = ends.scatter_reduce(0, sequence, place.where(is_answer, ends[sequence]), "amin")
    return first - starts[:-1]
