"""The protocol of an attention mode: what it computes, remembers, learns and launches.

A mode is a frozen dataclass of its settings. Whatever stands here has an answer that suits a mode
over keys and values; a mode overrides what it does otherwise, and nobody asks for its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.cache import GrowingLayer, Memory, SinkWindowLayer
from bitnet_triton.kernels import Mask


@dataclass(frozen=True)
class Kept:
    """Which keys a cache has to keep for the tokens to come.

    Attributes:
        recent: how many of the latest ones.
        sinks: how many of the first ones.
    """

    recent: int
    sinks: int = 0

    def __or__(self, other: Kept) -> Kept:
        """Return what serves both."""
        return Kept(max(self.recent, other.recent), max(self.sinks, other.sinks))


@dataclass(frozen=True)
class Reads:
    """What the last query of a call has read, as means over rows and the heads of queries.

    Attributes:
        rows: rows of keys and values whose values are in its output, each once: tokens, and what
            stands for several of them.
        scored: what it was compared with: those, and whatever chose them (all keys, means or
            bounds of blocks, codes, hashes).
    """

    rows: float
    scored: float


@dataclass(frozen=True, eq=False)
class StepLayer:
    """The attention layer whose decode step is recorded.

    Attributes:
        index: of the layer in the model.
        heads: of the queries.
        kv_heads: of keys and values.
        scale: multiplies the scores.
        module: what ``Mode.module`` has given the layer, or None.
    """

    index: int
    heads: int
    kv_heads: int
    scale: float
    module: nn.Module | None = None


class StepTensors(NamedTuple):
    """What the launches of one layer's decode step read; all of it stays where it is in memory.

    Attributes:
        heads: [B 1 H + 2 Hk D], the projections of queries, keys and values, not rotated.
        cos: [P D], the rotary embedding of all positions; of one where no mode of the model
            ``takes_rotated``.
        sin: likewise.
        places: int32 [k B], what the memory of the layer has told by ``places``.
        hidden_states: [B 1 K], the normed input of the layer for a mode that
            ``reads_hidden_states``; None for others.
    """

    heads: Tensor
    cos: Tensor
    sin: Tensor
    places: Tensor
    hidden_states: Tensor | None


# Maps the tensors of a step to attended heads [B 1 H D], by launches and nothing else
Step = Callable[[StepTensors], Tensor]


class Mode:
    """Which keys a query reads and what it makes of them.

    Subclasses are frozen dataclasses; ``register_mode`` gives them the name by which configs
    choose them.

    Attributes:
        name: in configs; set by ``register_mode``.
        counts_positions: whether positions go by what the memory holds instead of by the text, as
            an endless stream needs; a call's own ``position_ids`` are refused then.
        wants_prompt_len: whether its memory is to be told when a prompt is over, for which the
            length of the prompt has to be known; ``generate`` tells it.
        trains: what is trained when a model is adapted to the mode: "model", all weights or
            adapters beside them; "module", what the mode brings alone; "nothing", it has no
            gradient.
    """

    name: ClassVar[str] = ""
    trains: ClassVar[str] = "model"
    counts_positions: ClassVar[bool] = False
    wants_prompt_len: ClassVar[bool] = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D], what the memory has given, to [B Tq H D].

        Raises:
            ValueError: the call asks for what the mode does not do.
        """
        raise NotImplementedError

    def reads(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Reads | None:
        """Count what the last query reads, for ``bitnet-triton eval``; None: by trying it out.

        Trying, the default, changes ``k`` and ``v`` and watches the output. A mode that chooses by
        what its memory keeps, or reads more than ``k`` and ``v``, does not notice such changes: it
        counts for itself, by what it chooses for these tensors, not by its settings.

        Args:
            q: [B Tq H D].
            k: [B Tk Hk D].
            v: [B Tk Hk D].
            context: of a call that has run: the memory has taken in its tokens, and keeps them.
        """
        return None

    @property
    def span(self) -> int | None:
        """Where it counts positions: from how many tokens on no key is ever further away.

        Frequencies that go by the length of a text are chosen for that.
        """
        return None

    @property
    def kept(self) -> Kept | None:
        """Which keys and values the tokens to come may read; None: all."""
        return None

    @property
    def reads_keys(self) -> bool:
        """Whether it reads keys of former calls; otherwise it checks its memory itself."""
        return True

    @property
    def pages_mask(self) -> Mask | None:
        """What queries see, where exact attention by that is all it does: over pages too.

        None: it does more, or something else, which continuous batching has no place for.
        """
        return None

    @property
    def sees_everything(self) -> bool:
        """Whether it is causal attention over all keys."""
        return False

    def sees_all_of(self, length: int) -> bool:
        """Tell whether its settings make it that in every text of up to so many tokens."""
        return self.sees_everything

    @property
    def reads_any_rows(self) -> bool:
        """Whether it reads whatever keys a memory has left of a text, and tells it what they got.

        Such a mode looks at no key's place, and calls ``memory.after``.
        """
        return False

    @property
    def takes_dense_rows(self) -> bool:
        """Whether ``context.dense_from`` is followed: queries that see everything, in one call."""
        return False

    @property
    def reads_hidden_states(self) -> bool:
        """Whether ``context.hidden_states`` and those of a step are wanted."""
        return False

    @property
    def takes_rotated(self) -> bool:
        """Whether queries and keys come rotated; those of a step never do."""
        return True

    @property
    def takes_global_tokens(self) -> bool:
        """Whether ``forward`` and ``generate`` may name ``global_tokens``."""
        return False

    @property
    def recompute_objection(self) -> str | None:
        """Why a layer in training cannot run again to the same effect; None: it can."""
        return None

    @property
    def brings_memory(self) -> bool:
        """Whether it has a memory of its own, which then serves the other phase too."""
        return type(self).memory is not Mode.memory

    def memory(self, other: Mode) -> Memory:
        """Return an empty memory of one layer that serves this mode and ``other``.

        Args:
            other: the mode of the same layer in the other phase.

        Raises:
            ValueError: no memory serves both.
        """
        if other.brings_memory:
            return other.memory(self)  # it has a memory of its own, and decides for both
        if self.kept is None or other.kept is None:
            return GrowingLayer()
        kept = self.kept | other.kept
        return SinkWindowLayer(kept.recent, kept.sinks)

    def module(self, config: Any) -> nn.Module | None:
        """Return the parameters that the mode brings to each attention layer; None: none.

        The module hangs at the attention layer under the name of the mode, is trained and saved
        with the model, and comes back as ``context.module``. Its buffers have to be persistent.
        What it may say of itself: ``ternary = True``, that its linears become ternary with those of
        the model; ``init_from(attention)``, how it starts beside an attention layer that has
        weights already; and ``loss``, a scalar that a forward pass in training leaves there, or
        None: the model adds it to its own loss.

        Args:
            config: of the model.
        """
        return None

    def remember(self, k: Tensor, context: AttentionContext) -> None:
        """Put into the memory what the mode will want of tokens that another mode answers.

        Called where the modes of a layer differ by phase, for the one that does not run.

        Args:
            k: [B Tk Hk D], what the memory has given.
            context: of the call.
        """

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Return what one decode step launches, or why it cannot be recorded.

        Args:
            memory: of the layer, holding the tokens before the new one.
            layer: the attention layer.
        """
        return "it has no recorded step"
