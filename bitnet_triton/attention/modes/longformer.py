"""Longformer: windows by head, dilation, and global tokens (arXiv:2004.05150)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bitnet_triton.attention.checks import check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import check_served, masked_attention
from bitnet_triton.attention.mode import Kept, Mode, Step, StepLayer, StepTensors
from bitnet_triton.cache import Memory
from bitnet_triton.kernels import Mask


@dataclass(frozen=True)
class Longformer(Mode):
    """A window for each head, and tokens that see and are seen by everything before or after.

    Attributes:
        window: keys that each query sees, itself included; one number, or one for each head.
        dilation: distance between the keys of a window; one number, or one for each head.
        global_tokens: positions of global tokens in each text.
        global_mask: whether ``forward`` and ``generate`` may name further ones, as
            ``global_tokens``, bool [B T].
        global_projections: whether global queries have projections of their own
            (``GlobalProjections``) for themselves and for what they read.
    """

    window: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    global_tokens: tuple[int, ...] = ()
    global_mask: bool = False
    global_projections: bool = False

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("dilation", 1), ("global_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if name == "global_tokens" and not isinstance(value, tuple):
                got = type(value).__name__
                raise TypeError(f"`attention`: 'global_tokens': expected a list, got {got}")
            for number in value if isinstance(value, tuple) else (value,):
                check_number(name, number, least)
        for name in ("global_mask", "global_projections"):
            if not isinstance(getattr(self, name), bool):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"`attention`: {name!r}: expected true or false, got {got}")
        if self.global_projections and not (self.global_tokens or self.global_mask):
            raise ValueError(
                "`attention`: 'global_projections': expected 'global_tokens' or 'global_mask' "
                "beside it"
            )

    @property
    def kept(self) -> Kept | None:
        """The longest window without its last key; everything where tokens are global."""
        if self.global_tokens or self.global_mask:
            return None
        pairs = _by_head(self.window, self.dilation)
        return Kept(max((window - 1) * dilation for window, dilation in pairs))

    @property
    def reads_hidden_states(self) -> bool:
        """Projections of their own read them."""
        return self.global_projections

    @property
    def takes_global_tokens(self) -> bool:
        """With ``global_mask``."""
        return self.global_mask

    def module(self, config: Any) -> nn.Module | None:
        """Return the projections of global tokens."""
        return GlobalProjections(config) if self.global_projections else None

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Write the new token into the memory, and read its window and the global tokens."""
        if self.global_mask:
            return "global tokens are named by each call"
        if self.global_projections:
            return "global queries have projections of their own"
        if isinstance(self.window, tuple):
            return "heads have windows of their own"
        tokens = self.global_tokens or None
        mask = Mask(window=self.window, dilation=self.dilation, global_tokens=tokens)
        objection = memory.decode_objection(mask)
        if objection is not None:
            return objection

        def run(step: StepTensors) -> Tensor:
            q = memory.write(step.heads, step.cos, step.sin, step.places)
            return memory.decode(q, step.places, mask=mask, scale=layer.scale)[0]

        return run

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        check_served(self, context)
        tokens = self._tokens(q, k, context)
        parts = []
        for heads, window, dilation in self._groups(q.shape[2]):
            mask = Mask(window=window, dilation=dilation, global_tokens=tokens)
            part_q, part_k, part_v = (_heads(t, heads, q.shape[2]) for t in (q, k, v))
            parts.append(masked_attention(part_q, part_k, part_v, mask, context)[0])
        out = parts[0]
        if len(parts) > 1:
            order = torch.tensor([h for heads, *_ in self._groups(q.shape[2]) for h in heads])
            out = torch.cat(parts, dim=2)[:, :, order.argsort().to(q.device)]
        if not self.global_projections:
            return out
        if context.tokens.starts_a_text:
            return _with_global_queries(out, tokens, context)
        self._check_no_global_queries(q, tokens, context)
        return out

    def _check_no_global_queries(
        self, q: Tensor, tokens: tuple[int, ...] | Tensor | None, context: AttentionContext
    ) -> None:
        """Raise where a global query would have to read what a cache does not hold."""
        start = int(context.tokens.offset)
        if isinstance(tokens, Tensor):
            is_late = bool(tokens[:, start : start + q.shape[1]].any())
        else:
            left = 0 if context.tokens.leftpad is None else int(context.tokens.leftpad.max())
            is_late = any(start - left <= t < start + q.shape[1] for t in tokens or ())
        if is_late:
            raise ValueError(
                "`past_key_values`: global tokens with projections of their own belong into the "
                f"first call of a text; this one starts after {start} tokens"
            )

    def _groups(self, H: int) -> Iterator[tuple[list[int], int, int | tuple[int, ...]]]:
        """Yield heads that share a window, with it and with their dilation."""
        for name in ("window", "dilation"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != H:
                raise ValueError(
                    f"`attention`: {name!r}: expected one number or {H}, one a head, got "
                    f"{len(value)}"
                )
        if not isinstance(self.window, tuple):
            yield list(range(H)), self.window, self.dilation
            return
        for window in sorted(set(self.window)):
            heads = [h for h in range(H) if self.window[h] == window]
            steps = self.dilation
            yield heads, window, steps if isinstance(steps, int) else tuple(steps[h] for h in heads)

    def _tokens(
        self, q: Tensor, k: Tensor, context: AttentionContext
    ) -> tuple[int, ...] | Tensor | None:
        """Return the global tokens as ``Mask`` takes them."""
        if context.global_tokens is None or not self.global_mask:
            return self.global_tokens or None
        (B, Tq), Tk = q.shape[:2], k.shape[1]
        if context.tokens.dropped(Tq, Tk):
            raise ValueError("`past_key_values`: global tokens need a cache that keeps every key")
        given = context.global_tokens
        if given.dtype != torch.bool or given.ndim != 2 or given.shape[0] != B:
            raise ValueError(
                f"`global_tokens`: expected bool [B T] with B={B}, got {given.dtype} "
                f"{list(given.shape)}"
            )
        given = F.pad(given[:, :Tk], (0, max(Tk - given.shape[1], 0)))
        if not self.global_tokens:
            return given
        column = torch.arange(Tk, device=given.device)
        left = context.tokens.leftpad
        position = column[None] if left is None else column - left[:, None]
        chosen = torch.tensor(self.global_tokens, device=given.device)
        return given | torch.isin(position, chosen)


class GlobalProjections(nn.Module):
    """Projections of their own for global queries and what they read (arXiv:2004.05150, 3.1).

    State: ``q_proj``, ``k_proj`` and ``v_proj``, as those of the attention layer.

    Args:
        config: of the model.
    """

    ternary = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        K, heads, kv_heads = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        )  # fmt: skip
        self.head_dim = getattr(config, "head_dim", None) or K // heads
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            linear = nn.Linear(K, count * self.head_dim, bias=config.attention_bias)
            self.add_module(f"{name}_proj", linear)

    def init_from(self, attention: nn.Module) -> None:
        """Start as copies of the projections of ``attention``."""
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, copy.deepcopy(attention.get_submodule(name)))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map x [B T K] to q [B T H D], k and v [B T Hk D]; q and k rotated."""
        flat = (self.get_submodule(name)(x) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in flat)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        return q, k, v


def _by_head(
    window: int | tuple[int, ...], dilation: int | tuple[int, ...]
) -> list[tuple[int, int]]:
    count = max(len(value) if isinstance(value, tuple) else 1 for value in (window, dilation))
    windows, dilations = (
        value if isinstance(value, tuple) else (value,) * count for value in (window, dilation)
    )
    return list(zip(windows, dilations))


def _heads(x: Tensor, heads: list[int], H: int) -> Tensor:
    """Return the heads of queries, or of the keys that they read, out of x [B T H or Hk D]."""
    if len(heads) == H:
        return x
    index = torch.tensor(heads, device=x.device)
    return x[:, :, torch.div(index * x.shape[2], H, rounding_mode="floor")]


def _with_global_queries(
    out: Tensor, tokens: tuple[int, ...] | Tensor | None, context: AttentionContext
) -> Tensor:
    """Replace the rows of global queries in out [B T H D] by attention of their own heads.

    They are few: each reads all keys before it, in one product for all of them.
    """
    if context.module is None or context.inputs is None:
        raise ValueError("`attention`: 'global_projections': the layer has none")
    # [B T H D], [B T Hk D]
    q, k, v = context.module(context.hidden_states, *context.inputs.rotary)
    T, left = q.shape[1], context.tokens.leftpad
    column = torch.arange(T, device=q.device)
    position = column[None] if left is None else column - left[:, None]
    if isinstance(tokens, tuple):
        is_global = torch.isin(position, torch.tensor(tokens, device=q.device))
        count = min(len(tokens), T)
    else:
        assert tokens is not None
        is_global = tokens[:, :T]
        count = int(is_global.sum(-1).max())
    if count == 0:
        return out
    # the global columns of each row first, in their order
    rows = (~is_global).int().argsort(dim=-1, stable=True)[:, :count].expand(q.shape[0], -1)
    is_query = is_global.expand(q.shape[0], -1).gather(1, rows)
    is_visible = (column <= rows[..., None]) & (position >= 0)[:, None] & is_query[..., None]

    index = rows[..., None, None].expand(-1, -1, *q.shape[2:])
    groups = q.gather(1, index).unflatten(2, (k.shape[2], -1)).float()  # [B G Hk H/Hk D]
    scores = torch.einsum("bihgd,bjhd->bhgij", groups, k.float()) * context.scale
    if context.softcap is not None:
        scores = context.softcap * torch.tanh(scores / context.softcap)
    scores = scores.masked_fill(~is_visible[:, None, None], torch.finfo(scores.dtype).min)
    attended = torch.einsum("bhgij,bjhd->bihgd", scores.softmax(-1), v.float()).flatten(2, 3)
    kept = out.gather(1, index)
    chosen = torch.where(is_query[..., None, None], attended.to(out.dtype), kept)
    return out.scatter(1, index, chosen)
