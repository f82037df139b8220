"""Rotary embeddings of a BitNet model: every rope type of transformers, and dynamic YaRN.

Frequencies are those that transformers computes, angles those of ``rotary_angles``.

Some types choose their frequencies by the length of a text. Keys in a cache are rotated, so the
choice is made once, when the cache is empty, row by row, and holds as long as the cache does; a
call that goes beyond what it was made for is refused (``Frequencies.columns``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import transformers.models.bitnet.modeling_bitnet as hf
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bitnet_triton.kernels.rotary import rotary_angles

DYNAMIC_YARN = "dynamic_yarn"
# Of these, frequencies depend on how long a text is
BY_LENGTH = frozenset({"dynamic", DYNAMIC_YARN, "longrope"})
_UNBOUNDED = 2**62


def dynamic_yarn_frequencies(
    config: Any, device: torch.device | None = None, seq_len: int | None = None, **kwargs: Any
) -> tuple[Tensor, float]:
    """Return YaRN's frequencies [D / 2] and factor for a text of ``seq_len`` tokens.

    The factor is max(1, seq_len / L), with L the trained length (arXiv:2309.00071, section 3.4),
    and at most ``factor`` of the config. The signature is that of transformers' own functions.
    """
    parameters = config.rope_parameters
    ratio = max(1.0, (seq_len or 0) / parameters["original_max_position_embeddings"])
    fixed = copy(config)
    fixed.rope_parameters = {
        **parameters, "rope_type": "yarn", "factor": min(ratio, parameters["factor"]),
    }  # fmt: skip
    return ROPE_INIT_FUNCTIONS["yarn"](fixed, device, **kwargs)


ROPE_INIT_FUNCTIONS.setdefault(DYNAMIC_YARN, dynamic_yarn_frequencies)


@dataclass(frozen=True, eq=False)
class Frequencies:
    """By what the tokens of a cache, or of one call, are turned.

    Attributes:
        inv_freq: angles of one position, [D / 2]; where rows or tokens differ [B, 1 or T,
            D / 2].
        scale: multiplies cosines and sines, a number or [B, 1 or T, 1].
        lengths: of the text in each row, for which they were chosen; one number if all are treated
            alike; empty for packed texts.
        columns: of a cache, padding included, up to which they are the right ones; None: any.
    """

    inv_freq: Tensor
    scale: float | Tensor
    lengths: tuple[int, ...] = ()
    columns: int | None = None

    def shared(self) -> tuple[Tensor | None, float]:
        """Return frequencies [D / 2] and the factor of all tokens; None and 1 where they differ."""
        if isinstance(self.scale, Tensor):
            return None, 1.0
        return self.inv_freq, self.scale

    def rows(self, index: Tensor) -> Frequencies:
        """Return those of some rows, where rows differ.

        Args:
            index: int64 on the CPU.
        """
        place = index.to(self.inv_freq.device)
        assert isinstance(self.scale, Tensor)
        lengths = tuple(self.lengths[row] for row in index.tolist()) if self.lengths else ()
        return replace(
            self, inv_freq=self.inv_freq[place], scale=self.scale[place], lengths=lengths
        )

    @contextmanager
    def in_use(self, rotary: RotaryEmbedding | None = None) -> Iterator[None]:
        """Let rotary embeddings that choose by length use these.

        Args:
            rotary: the one that is called; torch.compile traces no context variable, but sees
                through an attribute, which is then never set outside the graph.
        """
        if torch.compiler.is_compiling() and rotary is not None:
            rotary.traced = self
            yield
            rotary.traced = None
            return
        token = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(token)


_IN_USE: ContextVar[Frequencies | None] = ContextVar("rotary frequencies", default=None)


class RotaryEmbedding(hf.BitNetRotaryEmbedding):
    """transformers' module with exact angles, and frequencies that a cache can keep.

    Attributes:
        rope_parameters: those of the config when it was built.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rope_parameters = dict(config.rope_parameters)
        self.traced: Frequencies | None = None  # within one call, while torch.compile traces it

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies depend on how long a text is."""
        return self.rope_type in BY_LENGTH

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # casts are for weights: in bfloat16 an angle is wrong from position 257 on
        buffers = {name: getattr(self, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, former in buffers.items():
            moved = getattr(self, name)
            if moved.dtype != former.dtype:
                setattr(self, name, former.to(moved.device))
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [B T D] in the dtype of ``x`` for positions [B or 1, T]."""
        inv_freq: Tensor = self.inv_freq
        scale: float | Tensor = self.attention_scaling
        if self.depends_on_length:
            chosen = self.traced or _IN_USE.get() or self.choose(text_lengths(position_ids))
            inv_freq, scale = chosen.inv_freq, chosen.scale
        angles = rotary_angles(position_ids, inv_freq.to(x.device))
        parts = (angles.cos() * scale, angles.sin() * scale)
        # autocast joins no halves of another kind than its own: join, then cast
        cos, sin = (torch.cat((part, part), dim=-1).to(x.dtype) for part in parts)
        return cos, sin

    def choose(self, lengths: Tensor, columns: int | None = None) -> Frequencies:
        """Return the frequencies for texts of some lengths.

        Args:
            lengths: [B], or [B T] for each token the length of its text.
            columns: see ``Frequencies``.
        """
        steps, inverse = torch.unique(self._steps(lengths), return_inverse=True)
        compute = ROPE_INIT_FUNCTIONS[cast("str", self.rope_type)]
        parts = [compute(self.config, self.inv_freq.device, seq_len=int(step)) for step in steps]
        known = tuple(lengths.tolist()) if lengths.ndim == 1 else ()
        if len(parts) == 1:
            return Frequencies(*parts[0], known[:1], columns)
        inverse = inverse.to(self.inv_freq.device)
        inverse = inverse[:, None] if inverse.ndim == 1 else inverse
        inv_freq = torch.stack([part for part, _ in parts])[inverse]
        scale = inv_freq.new_tensor([factor for _, factor in parts])[inverse, None]
        return Frequencies(inv_freq, scale, known, columns)

    def choose_for_pages(self) -> Frequencies:
        """Return those of the longest text: for all requests of continuous batching alike.

        Requests share pages and steps there, and none may meet keys that are turned otherwise.

        Raises:
            ValueError: for this rope type no text is the longest.
        """
        if self._last_step is None:
            raise ValueError(
                f"`cache`: rope type {self.rope_type!r} turns for ever longer texts otherwise, "
                "and pages of continuous batching are read by all of them; use `generate`"
            )
        return self.choose(torch.tensor([self._last_step]))

    def last_position(self, lengths: Tensor) -> Tensor:
        """Return up to how many tokens texts of some lengths [B] keep their frequencies: [B]."""
        grown, last = lengths.clamp_min(self._trained), self._last_step
        return grown if last is None else grown.masked_fill(lengths >= last, _UNBOUNDED)

    @property
    def _trained(self) -> int:
        if self.rope_type == "dynamic":  # as in transformers
            return int(self.config.max_position_embeddings)
        return int(self._parameters_of_rope["original_max_position_embeddings"])

    @property
    def _last_step(self) -> int | None:
        """The length from which on frequencies stay as they are; None: there is none."""
        if self.rope_type == "longrope":
            return self._trained + 1
        if self.rope_type == DYNAMIC_YARN:
            return math.ceil(self._trained * max(1.0, self._parameters_of_rope["factor"]))
        return None

    @property
    def _parameters_of_rope(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.config.rope_parameters)

    def _steps(self, lengths: Tensor) -> Tensor:
        """Return one number for all lengths that get the same frequencies."""
        return lengths.clamp(self._trained, self._last_step)


def text_lengths(position_ids: Tensor) -> Tensor:
    """Return the lengths of texts by positions [B T]: [B], or [B T] for packed ones."""
    restarts = position_ids.diff(dim=-1) < 0
    if not bool(restarts.any()):
        return position_ids.amax(-1) + 1
    text = torch.nn.functional.pad(restarts.long().cumsum(-1), (1, 0))
    longest = torch.zeros_like(position_ids).scatter_reduce(-1, text, position_ids + 1, "amax")
    return longest.gather(-1, text)


def frequencies_of(cache: Cache | None) -> Frequencies | None:
    """Return what the keys of a cache were turned by, if that had to be chosen."""
    found = getattr(cache, "_frequencies", None)
    return found if isinstance(found, Frequencies) else None


def keep_frequencies(cache: Cache, chosen: Frequencies) -> None:
    """Let the keys of an empty cache be turned by ``chosen``."""
    cache._frequencies = chosen  # type: ignore[attr-defined]
    if chosen.inv_freq.ndim == 3:
        for name, place in _MOVES.items():
            setattr(cache, name, _WithFrequencies(cache, name, place))


def fix_frequencies(rotary: RotaryEmbedding, cache: Cache, length: int) -> None:
    """Let all keys of a cache be turned as in texts of ``length``, whatever its first call says."""
    last = int(rotary.last_position(torch.tensor([length])))
    chosen = rotary.choose(torch.tensor([length]), last if last < _UNBOUNDED else None)
    keep_frequencies(cache, chosen)
    cache._is_turned = True  # type: ignore[attr-defined]


def _is_turned(cache: Cache | None) -> bool:
    """Tell whether a cache has its frequencies already: keys, or ``fix_frequencies``."""
    if cache is None:
        return False
    return bool(getattr(cache, "_is_turned", False) or cache.get_seq_length())


@dataclass(frozen=True, eq=False)
class _WithFrequencies:
    """A method of one cache that moves its rows: frequencies that differ by row go with them."""

    cache: Cache
    name: str
    place: Callable[[Tensor, Any], Tensor]

    def __call__(self, argument: Any) -> None:
        getattr(type(self.cache), self.name)(self.cache, argument)
        chosen = frequencies_of(self.cache)
        if chosen is not None and chosen.inv_freq.ndim == 3:
            rows = torch.arange(chosen.inv_freq.shape[0])
            self.cache._frequencies = chosen.rows(self.place(rows, argument))  # type: ignore[attr-defined]


def _picked(rows: Tensor, index: Tensor) -> Tensor:
    return rows[index.cpu()]


_MOVES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": _picked,
    "batch_select_indices": _picked,
    "batch_repeat_interleave": torch.Tensor.repeat_interleave,
}


def bind(rotary: Any, cache: Cache | None) -> None:
    """Take note that the keys of a cache are turned by ``rotary``; refuse those that are not.

    Raises:
        ValueError: it holds keys of another rotary embedding, that of before ``extend_context``.
    """
    if cache is None:
        return
    former, parameters = getattr(cache, "_rotary", None), rotary.rope_parameters
    if former is None or (former != parameters and not cache.get_seq_length()):
        cache._rotary = parameters  # type: ignore[attr-defined]
    elif former != parameters:
        raise ValueError(
            f"`past_key_values`: its keys are rotated for {former}, the model has {parameters} "
            "now; start with an empty cache"
        )


def chosen_frequencies(
    rotary: RotaryEmbedding,
    cache: Cache | None,
    x: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    context_length: int | Tensor | None,
    *,
    span: int | None = None,
) -> Frequencies:
    """Return the frequencies of a call: those of its cache, or a choice that the cache keeps.

    Args:
        rotary: that of the model; it depends on length.
        cache: of the call.
        x: ids [B T] or embeddings [B T D].
        attention_mask: as the model got it; [B T] tells padding.
        position_ids: as the model got them.
        context_length: tokens that each text will have at most, padding not counted, a number or
            integers [B]; None: those of this call.
        span: tokens that a query sees at most, where no layer looks further: the choice is made
            for that, and a text may be endless.

    Raises:
        TypeError: ``context_length`` is of a wrong type.
        ValueError: it is of a wrong shape or too small, or the call goes beyond what the cache's
            frequencies were chosen for.
    """
    B, T = x.shape[:2]
    held = 0 if cache is None else int(cache.get_seq_length())
    if held or _is_turned(cache):
        return _kept(cache, held + T, context_length)
    if span is not None:
        chosen = rotary.choose(torch.tensor([span]))
        if cache is not None:
            keep_frequencies(cache, chosen)
        return chosen
    told = lengths = _told_lengths(attention_mask, position_ids, B, T)
    if context_length is not None:
        lengths = _checked_length(context_length, lengths, B)
    if cache is None:
        return rotary.choose(lengths)
    columns = int((rotary.last_position(lengths) + T - told).min())
    chosen = rotary.choose(lengths, columns if columns < _UNBOUNDED else None)
    keep_frequencies(cache, chosen)
    return chosen


def _told_lengths(attention_mask: Any, position_ids: Tensor | None, B: int, T: int) -> Tensor:
    """Return the lengths of texts without padding, [B], or [B T] of packed ones."""
    is_token: Tensor | None = None
    if isinstance(attention_mask, Tensor) and attention_mask.shape == (B, T):
        is_token = attention_mask.cpu() != 0
    if position_ids is None:
        return torch.full((B,), T) if is_token is None else is_token.sum(-1)
    positions = position_ids.cpu().expand(B, T)
    if is_token is not None:
        # padding behind a text goes on with its last position, no text begins there
        last = torch.arange(T).where(is_token, torch.zeros(())).long().cummax(-1).values
        is_in_front = is_token.cumsum(-1) == 0
        positions = positions.gather(-1, last).masked_fill(is_in_front, 0)
    return text_lengths(positions)


def _kept(cache: Any, columns: int, context_length: int | Tensor | None) -> Frequencies:
    chosen = frequencies_of(cache)
    if chosen is None:
        raise ValueError(
            "`past_key_values`: nobody knows for which length its keys were rotated; start with an "
            "empty cache"
        )
    if chosen.columns is not None and columns > chosen.columns:
        raise ValueError(
            f"`past_key_values`: its keys are rotated for texts of up to {chosen.columns} columns, "
            f"this call needs {columns}; start with an empty cache, and give its first call (or "
            "`generate`) `context_length`, the tokens that the text will have in the end"
        )
    return chosen


def _checked_length(context_length: int | Tensor, lengths: Tensor, B: int) -> Tensor:
    if isinstance(context_length, Tensor):
        if context_length.is_floating_point() or context_length.shape != (B,):
            raise ValueError(
                f"`context_length`: expected integers [B] with B={B}, got "
                f"{context_length.dtype} {list(context_length.shape)}"
            )
        wanted = context_length.cpu().long()
    elif isinstance(context_length, int) and not isinstance(context_length, bool):
        wanted = torch.full((B,), context_length)
    else:
        got = type(context_length).__name__
        raise TypeError(f"`context_length`: expected an integer, got {got}")
    if lengths.ndim == 2:
        raise ValueError("`context_length`: expected none for packed texts, each has its own")
    if bool((wanted < lengths).any()):
        raise ValueError(
            f"`context_length`: expected at least the {int(lengths.max())} tokens of the call, got "
            f"{int(wanted.min())}"
        )
    return wanted


def depends_on_length(model: Any) -> bool:
    """Tell whether a model of this package chooses its frequencies by the length of a text."""
    rotary = getattr(getattr(model, "base_model", None), "rotary_emb", None)
    return isinstance(rotary, RotaryEmbedding) and rotary.depends_on_length


def check_context_length(context_length: int | Tensor | None, rotary: RotaryEmbedding) -> None:
    """Raise where a length is told that nothing depends on."""
    if context_length is not None and not rotary.depends_on_length:
        raise ValueError(
            f"`context_length`: expected none, rope type {rotary.rope_type!r} does not depend on it"
        )


def plan_length(rotary: RotaryEmbedding, config: Any, model_kwargs: dict[str, Any]) -> None:
    """Tell the model how long texts will get, before ``generate`` reads the prompt.

    Raises:
        ValueError: the cache that is continued was made for shorter texts.
    """
    if not rotary.depends_on_length:
        return
    cache = model_kwargs.get("past_key_values")
    columns, embeds = config.max_length, model_kwargs.get("inputs_embeds")
    if embeds is not None:  # which `max_length` does not count
        columns += embeds.shape[1]
    if _is_turned(cache):
        _kept(cache, columns, None)
    elif model_kwargs.get("context_length") is None:
        mask = model_kwargs.get("attention_mask")
        lengths: int | Tensor = columns
        if isinstance(mask, Tensor) and mask.ndim == 2:
            lengths = columns - (mask == 0).sum(-1)
        model_kwargs["context_length"] = lengths
