"""How well a model predicts text, by where a token stands: a lost context shows far back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.models.rotary import depends_on_length
from bitnet_triton.training.tasks import TextTokens

_PIECES = 8  # of a text, for which losses are told apart
_GENERATED = 32  # tokens that come at a time, where a memory is put to the test


def windows(tokens: TextTokens, length: int, count: int) -> list[list[int]]:
    """Return stretches of held-out text, as far from each other as they can be."""
    text, size = tokens.haystack.ids, length - len(tokens.start)
    if len(text) < size:
        raise ValueError(f"`lengths`: the text to measure on has {len(text)} tokens, not {size}")
    last = len(text) - size
    starts = [last * index // max(count - 1, 1) for index in range(min(count, last + 1))]
    return [tokens.start + text[start : start + size] for start in starts]


def _logits_through(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Return the logits of ids [B T], of which the second half is read from ``cache``."""
    T = ids.shape[1]
    prompt = T // 2
    kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "prompt_len": prompt}
    if depends_on_length(model):
        kwargs["context_length"] = T
    ends = [0, prompt, *range(prompt + _GENERATED, T, _GENERATED), T]
    parts = [model(ids[:, start:end], **kwargs).logits for start, end in pairwise(ends)]
    return torch.cat(parts, dim=1)


def bits(
    model: Any, tokens: TextTokens, texts: Sequence[list[int]], cache: Any = None
) -> list[dict[str, float]]:
    """Return what texts of one length cost: for each eighth of them, in the order of positions.

    Args:
        model: a ``BitNetForCausalLM``.
        tokens: of the model.
        texts: of one length.
        cache: an empty one whose memory is put to the test: the first half of a text is its prompt,
            the rest comes as generated tokens, some at a time. None: without a cache.

    Returns:
        for each piece of each text ``piece``, ``bits``, ``tokens`` and ``bytes``.
    """
    ids = torch.tensor(texts, device=model.device)
    with torch.inference_mode():
        if cache is None:
            logits = model(ids, use_cache=False).logits
        else:
            logits = _logits_through(model, ids, cache)
        logits = logits[:, :-1].float()
        nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
    found = []
    edges = [1 + (ids.shape[1] - 1) * piece // _PIECES for piece in range(_PIECES + 1)]
    for text, cost in zip(texts, nats):
        for piece, (start, end) in enumerate(pairwise(edges)):
            found.append(
                {
                    "piece": piece,
                    "bits": cost[start - 1 : end - 1].sum().item() / math.log(2),
                    "tokens": end - start,
                    "bytes": len(tokens.tokenizer.decode(text[start:end]).encode()),
                }
            )
    return found
