"""Greedy decoding that writes no logits: what ``generate(do_sample=False)`` runs.

The output head compares as it multiplies, and from one step to the next only the token changes.
transformers' loop writes all logits, copies them in float32, and prepares the arguments of every
step from the start; it stays for whatever needs logits.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from bitnet_triton.models.bitnet.ahead import StepAhead, Told, can_run_ahead, longest
from bitnet_triton.models.fused.fusion import has_global_hooks
from bitnet_triton.nn.divided import HeadPart
from bitnet_triton.nn.head import Int8Head, OutputHead
from bitnet_triton.runtime.device import autocast_dtype

logger = logging.getLogger("bitnet_triton")

# head -> its forward, which computes what ``topk`` compares
_FORWARDS: dict[type, Any] = {kind: kind.forward for kind in (OutputHead, Int8Head, HeadPart)}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def greedy_objection(
    model: Any, processors: Any, config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> str | None:
    """Say why ``decode_greedily`` cannot do what ``generate`` was asked for; None when it can."""
    cache = model_kwargs.get("past_key_values")
    reasons = {
        "tokens are sampled": config.do_sample,
        "scores are processed": len(processors) > 0,
        "logits or what is inside of the model are wanted": config.return_dict_in_generate
        and any(getattr(config, name) for name in _OUTPUTS),
        "ranks wait for each other": synced_gpus,
        "the cache does not grow": cache is None or cache.is_compileable,
        "the output head is another one": type(model.lm_head) not in _FORWARDS,
        "a forward is watched, compiled or replaced": _is_special(model)
        or _is_special(model.lm_head),
        "autocast chooses dtypes": autocast_dtype(model.lm_head.weight.device.type) is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@functools.cache
def tell_once(objection: str | None) -> None:
    """Log which loop writes the tokens."""
    if objection is None:
        logger.info("greedy decoding: the output head gives the best token, and no logits")
    else:
        logger.info("generate runs transformers' loop: %s", objection)


def _is_special(module: Any) -> bool:
    """Tell whether calling a module does more than its class says."""
    return bool(
        has_global_hooks()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._compiled_call_impl
        or "forward" in module.__dict__  # accelerate replaces it too
        or _FORWARDS.get(type(module), type(module).forward) is not type(module).forward
    )


def decode_greedily(
    model: Any,
    input_ids: Tensor,
    stopping_criteria: Any,
    config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput:
    """Write the likeliest tokens behind ``input_ids`` [B T], with what ``generate`` has prepared.

    Returns:
        int64 [B T + new]; in transformers' output, with the cache, if ``config`` wants that.
    """
    ids = input_ids
    is_first = not config.is_assistant
    outputs = model._prefill(input_ids, config, model_kwargs, is_first_iteration=is_first)
    token = outputs.logits[:, -1].float().argmax(-1)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    del outputs  # logits of a prompt may be large
    padding = None
    if any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
        padding = config._pad_token_tensor.to(token.device)
    next_token = _Steps(model, model_kwargs)
    cache, most = model_kwargs["past_key_values"], longest(stopping_criteria)
    ahead = can_run_ahead(token.device, cache)
    unfinished, started = torch.ones_like(token), None
    try:
        while True:
            if padding is not None:
                token = token * unfinished + padding * (1 - unfinished)
            ids = torch.cat([ids, token[:, None]], 1)
            unfinished = unfinished & ~stopping_criteria(ids, None)
            goes_on = Told(unfinished.any())
            written = None if streamer is None else Told(token)
            if ahead and next_token.needs_no_look and (most is None or ids.shape[1] < most):
                started = StepAhead(next_token, ids, cache)
            if written is not None:
                streamer.put(written.read().clone())  # not pinned, if it is kept
            if not goes_on.read():
                break
            token, started = next_token(ids) if started is None else started.take(), None
    finally:
        if started is not None:
            started.take_back()
    if started is not None:
        started.wait()
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return ids
    return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=cache)  # type: ignore[arg-type]


class _Steps:
    """Runs the decoder for the last token of some ids; what else it is told changes by one."""

    def __init__(self, model: Any, model_kwargs: dict[str, Any]) -> None:
        self._model, self._kwargs = model, model_kwargs
        self._step: dict[str, Any] = {}

    @property
    def needs_no_look(self) -> bool:
        """Whether a step is started without looking at padding, which waits for the GPU."""
        looked_at = (self._step.get(name) for name in ("attention_mask", "position_ids"))
        return bool(self._step) and all(value is None for value in looked_at)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the likeliest tokens behind ``ids`` [B T] as [B]."""
        if self._step:
            self._step = _next_step(self._step, ids)
        else:
            self._step = _first_step(self._model, ids, self._kwargs)
        hidden = self._model.model(**self._step).last_hidden_state
        return self._model.lm_head.topk(hidden[:, -1])[1][:, 0]


def _first_step(model: Any, ids: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the decoder's arguments of the first step, as transformers prepares them."""
    step = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
    step.pop("logits_to_keep", None)
    mask, positions = step.get("attention_mask"), step.get("position_ids")
    held = model_kwargs["past_key_values"].get_seq_length()
    sees_all = mask is None or (mask.shape[1] == held + 1 and bool(mask.all()))
    if sees_all and (positions is None or bool((positions == held).all())):
        step |= {"attention_mask": None, "position_ids": None}  # what a decoder takes for granted
    return step


def _next_step(last: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    step = {**last, "input_ids": ids[:, -1:]}
    mask, positions = step.get("attention_mask"), step.get("position_ids")
    if mask is not None:
        step["attention_mask"] = torch.cat([mask, mask.new_ones((len(mask), 1))], 1)
    if positions is not None:
        step["position_ids"] = positions + 1
    return step
