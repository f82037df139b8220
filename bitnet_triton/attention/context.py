"""What an attention mode knows besides queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_triton.attention.tokens import Tokens

PHASES = ("prefill", "decode")


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What entered an attention layer.

    Attributes:
        hidden_states: [B T K], normed; None from a fused layer whose modes do not read them.
        rotary: cosines and sines of the tokens' positions, each [B or 1, T, D].
        memory: the cache layer of this layer, ``update`` behind it; None: no cache, or one that is
            not of this package.
        is_cached: whether the call has a cache of any kind.
    """

    hidden_states: Tensor | None
    rotary: tuple[Tensor, Tensor]
    memory: Any = None
    is_cached: bool = False


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """The only inputs of a mode beside q, k and v, so that every mode fits into any layer.

    Attributes:
        layer: index of the layer.
        scale: multiplies the scores before the softmax.
        tokens: where the queries stand, and the padding.
        dropout: probability of dropping a weight, 0 outside of training.
        softcap: largest magnitude of a score; None: no bound.
        prompt_len: columns of the prompt, padding included, a number or integers [B], or [S] for
            packed sequences: queries from there on were generated, those before belong to the
            prompt. None: all of them do.
        dense_from: queries from this position on see every key; set where prompt and generated
            tokens meet in one call.
        positions: [B Tq] or [1 Tq], where the rotary embedding has put the queries.
        frequencies: [D / 2], angles of the rotary embedding for each position.
        rotary_scale: what its cosines and sines are multiplied with; None: 1.
        global_tokens: bool [B T], columns that see and are seen by everything; None: none.
        s_aux: [H], learnable sinks, as for ``flash_attention``; None: none.
        inputs: what entered the layer; None from a model that does not tell.
        module: what the mode has brought to the layer by ``Mode.module``, or None.
    """

    layer: int
    scale: float
    tokens: Tokens = Tokens()  # noqa: RUF009  frozen
    dropout: float = 0.0
    softcap: float | None = None
    prompt_len: int | Tensor | None = None
    dense_from: int | Tensor | None = None
    positions: Tensor | None = None
    frequencies: Tensor | None = None
    rotary_scale: float | None = None
    global_tokens: Tensor | None = None
    s_aux: Tensor | None = None
    inputs: LayerInputs | None = None
    module: nn.Module | None = None

    @property
    def hidden_states(self) -> Tensor:
        """The hidden states that entered the layer, [B Tq K]; normed.

        Raises:
            ValueError: the model does not tell them.
        """
        if self.inputs is None or self.inputs.hidden_states is None:
            raise ValueError("`attention`: the mode reads hidden states, which the layer hides")
        return self.inputs.hidden_states

    @property
    def memory(self) -> Any:
        """The cache layer, with the tokens of this call in it; None without one of ours."""
        return None if self.inputs is None else self.inputs.memory

    @property
    def is_cached(self) -> bool:
        """Whether the call has a cache, of this package or of another one."""
        return self.inputs is not None and self.inputs.is_cached

    def phase(self, Tq: int) -> str | None:
        """Return "prefill" or "decode"; None for a call with tokens of both, or of unknown ones."""
        offset = self.tokens.offset
        if self.prompt_len is None:
            return "prefill"
        if self.tokens.cu_seqlens is not None:
            return None  # places in a row are none in a sequence
        if isinstance(self.prompt_len, Tensor) or isinstance(offset, Tensor):
            return None  # to look would stop the device
        if offset >= self.prompt_len:
            return "decode"
        return "prefill" if offset + Tq <= self.prompt_len else None

    def first_generated(self) -> int | Tensor:
        """Return ``prompt_len`` as a position, which padding to the left does not count."""
        assert self.prompt_len is not None
        if self.tokens.leftpad is not None:
            return (self.prompt_len - self.tokens.leftpad).clamp_min(0).int()
        return self.prompt_len.int() if isinstance(self.prompt_len, Tensor) else self.prompt_len

    def is_generated(self, q: Tensor) -> Tensor:
        """Return bool [B or 1, Tq]: which queries of q [B Tq H D] were generated."""
        assert self.prompt_len is not None
        starts = self.tokens.cu_seqlens
        if starts is not None:  # a prompt's length counts from where its sequence starts
            tokens = torch.arange(q.shape[0] * q.shape[1], device=q.device)
            sequence = torch.bucketize(tokens, starts[1:], right=True)
            length = self.prompt_len
            if isinstance(length, Tensor):
                length = length[sequence]
            return (tokens - starts[sequence] >= length).view(q.shape[:2])
        columns = torch.arange(q.shape[1], device=q.device) + self.tokens.offset
        if isinstance(self.prompt_len, Tensor):
            return columns >= self.prompt_len[:, None]
        return columns[None] >= self.prompt_len
