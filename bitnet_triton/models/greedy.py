"""Greedy decoding that never writes logits: ``model.generate(..., custom_generate=greedy)``.

The output head compares as it multiplies, and of a step's arguments only the token changes, so
nothing is prepared anew. transformers' own loop writes 128 thousand logits, copies them in float32,
and builds masks and positions from the start for every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.models.bitnet.modeling_bitnet import BitNetForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from bitnet_triton.nn.head import OutputHead

_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def greedy(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Write the likeliest tokens; transformers' ``generate`` calls this with what it has prepared.

    ``model.generate(**inputs, max_new_tokens=64, custom_generate=bitnet_triton.greedy)`` gives the
    tokens of ``do_sample=False``. Streamers, stopping criteria, padded batches and caches work as
    they do there.

    Args:
        model: BitNet or Llama, ``fuse``d for the full effect.
        input_ids: int64 [B T], the prompt.
        logits_processor: has to be empty: there are no logits to process.
        stopping_criteria: are called with the tokens so far, and None for the scores.
        generation_config: greedy, without outputs besides tokens and the cache.
        synced_gpus: has to be False.
        streamer: gets each token, or None.
        **model_kwargs: cache, attention mask and what else the model takes.

    Returns:
        int64 [B T + new]; with ``return_dict_in_generate`` in transformers' output, with the cache.

    Raises:
        ValueError: something is asked for that needs logits, or more than one sequence a row.
        TypeError: the model is neither BitNet nor Llama.
    """
    _check(model, logits_processor, generation_config, synced_gpus)
    ids, outputs = input_ids, model._prefill(input_ids, generation_config, model_kwargs)
    token = outputs.logits[:, -1].float().argmax(-1)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    del outputs
    step: dict[str, Any] | None = None
    unfinished = torch.ones_like(token)
    padding = generation_config._pad_token_tensor
    while True:
        if padding is not None:
            token = token * unfinished + padding.to(token.device) * (1 - unfinished)
        ids = torch.cat([ids, token[:, None]], 1)
        if streamer is not None:
            streamer.put(token.cpu())
        unfinished = unfinished & ~stopping_criteria(ids, None)
        if not unfinished.any():
            break
        step = _next_step(model, ids, model_kwargs, step)
        token = _best(model, model.model(**step).last_hidden_state[:, -1])
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(
            sequences=ids, past_key_values=model_kwargs.get("past_key_values")
        )
    return ids


def _next_step(
    model: Any, ids: Tensor, model_kwargs: dict[str, Any], last: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the decoder's arguments of a step: as transformers prepares them, or one further."""
    if last is None:
        prepared = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
        step = {k: v for k, v in prepared.items() if k not in ("logits_to_keep", "return_dict")}
        mask, positions = step.get("attention_mask"), step.get("position_ids")
        is_whole = mask is None or (mask.ndim == 2 and bool(mask.all()))
        if is_whole and positions is not None and bool((positions == ids.shape[1] - 1).all()):
            # what the decoder takes for granted
            step |= {"attention_mask": None, "position_ids": None}
        return step
    step = {**last, "input_ids": ids[:, -1:]}
    mask, positions = step.get("attention_mask"), step.get("position_ids")
    if mask is not None:
        step["attention_mask"] = torch.cat([mask, mask.new_ones((len(mask), 1))], 1)
    if positions is not None:
        step["position_ids"] = positions + 1
    return step


def _best(model: Any, hidden: Tensor) -> Tensor:
    head = model.lm_head
    if isinstance(head, OutputHead) and not head._forward_hooks and not head._forward_pre_hooks:
        return head.topk(hidden)[1][:, 0]
    return head(hidden).float().argmax(-1)


def _check(model: Any, processors: Any, config: Any, synced_gpus: bool) -> None:
    if not isinstance(model, PreTrainedModel) or not isinstance(
        model, (BitNetForCausalLM, LlamaForCausalLM)
    ):
        raise TypeError(f"`model`: expected BitNet or Llama, got {type(model).__name__}")
    if len(processors):
        names = ", ".join(type(processor).__name__ for processor in processors)
        raise ValueError(f"`greedy` writes no logits, so nothing can process them; got {names}")
    asked = [name for name in _OUTPUTS if config.return_dict_in_generate and getattr(config, name)]
    if asked:
        raise ValueError(f"`greedy` returns tokens and the cache only, not {', '.join(asked)}")
    if config.do_sample or config.num_beams != 1 or synced_gpus:
        raise ValueError(
            "`greedy` takes the likeliest token of each row: expected do_sample=False, num_beams=1 "
            f"and synced_gpus=False, got {config.do_sample}, {config.num_beams}, {synced_gpus}"
        )
