"""Blocks found by a learned index: MSA (arXiv:2606.13392)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from bitnet_triton.attention.block_index import BlockIndex
from bitnet_triton.attention.blocks import BlockMode, Rows, check_blocks, choose_blocks, rows_of
from bitnet_triton.attention.checks import check_known
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.index_loss import index_loss
from bitnet_triton.attention.masked import attend_and_tell
from bitnet_triton.attention.mode import Mode, Step, StepLayer, StepTensors
from bitnet_triton.attention.tokens import CAUSAL
from bitnet_triton.cache import IndexLayer, Memory
from bitnet_triton.cache.key_values import LEFTPAD, POSITION, SLOT, USED
from bitnet_triton.kernels import Units

Stage = Literal["dense", "selected"]
IndexKeys = Literal["float", "int8"]
_TOKENS = Units()


@dataclass(frozen=True)
class IndexedBlocks(BlockMode):
    """The blocks that hold the token which an index likes best.

    The score of a block is the largest product of the token's index query, one for each head of
    keys, with the index key of a token in it. The index learns from attention itself: in training
    the layer adds KL(attention || index) to the loss of the model, whose weights do not feel it.

    Attributes:
        block: tokens of a block.
        selected: blocks that each token reads, those that are read always included.
        initial: first blocks that are read always.
        local: last blocks that are read always, the own one included.
        index_keys: how the cache keeps them: "int8" with one scale a token, or "float", as they
            are.
        stage: of training. "dense": attention reads everything and teaches the index, which
            chooses nothing yet; "selected": attention reads what the index chooses and teaches it
            about that alone.
        dense_below: tokens of a text that read everything.
    """

    trains: ClassVar[str] = "module"  # attention teaches the index, and stays as it is

    block: int = 128
    selected: int = 16
    initial: int = 0
    local: int = 1
    index_keys: str = "int8"
    stage: str = "selected"
    dense_below: int = 0

    def __post_init__(self) -> None:
        check_blocks(self, self.block)
        check_known("'index_keys'", self.index_keys, get_args(IndexKeys))
        check_known("'stage'", self.stage, get_args(Stage))

    @property
    def reads_hidden_states(self) -> bool:
        """The index is a projection of them."""
        return True

    @property
    def recompute_objection(self) -> str | None:
        """Its loss stands beside the output of the layer."""
        return "the loss by which its index learns would be left without a gradient"

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.block

    def module(self, config: Any) -> nn.Module:
        """Return the index of a layer."""
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        return BlockIndex(
            config.hidden_size, config.num_key_value_heads, head_dim, config.rms_norm_eps
        )

    def build_memory(self, other: Mode, modes: list[BlockMode]) -> Memory:
        """Return a memory with index keys."""
        if isinstance(other, IndexedBlocks) and other.index_keys != self.index_keys:
            raise ValueError(
                "`attention`: 'index_keys': expected the same in both phases of a layer, got "
                f"{self.index_keys!r} and {other.index_keys!r}"
            )
        units = [each for mode in modes for each in mode.units]
        switches = [mode.dense_below for mode in modes]
        return IndexLayer(units, switches, codes=self.index_keys == "int8")

    def remember(self, k: Tensor, context: AttentionContext) -> None:
        """Add the index keys of a call to the memory of the layer."""
        if isinstance(context.memory, IndexLayer):
            with torch.no_grad():
                context.memory.add_index(self._keys(context))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        self.check_call(q, k, context)
        self.remember(k, context)
        index = self._index(context)
        index.loss = None
        if not (index.training and torch.is_grad_enabled() and index.key.weight.requires_grad):
            return super().__call__(q, k, v, context)
        rows = rows_of(q, context)
        if rows.tokens != q.shape[1]:
            return super().__call__(q, k, v, context)  # the keys before have no gradient
        return self._train(q, k, v, rows, context)

    def _train(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, context: AttentionContext
    ) -> Tensor:
        """Attend, and leave at the index what it has to learn of it."""
        index, rotary = self._index(context), context.inputs.rotary  # type: ignore[union-attr]
        queries = index.queries(context.hidden_states, rotary)
        keys = index.keys(context.hidden_states, rotary)
        indices = None
        if self.stage == "dense":
            out = attend_and_tell(q, k, v, CAUSAL, context)
        else:
            out = super().__call__(q, k, v, context)
            with torch.no_grad():
                indices = self._choose(queries.detach(), keys.detach(), None, rows)
        starts, is_query = _texts(q, rows, context)
        index.loss = index_loss(
            queries, keys, q, k[:, : q.shape[1]], scale=context.scale, block=self.block,
            starts=starts, is_query=is_query, indices=indices,
        )  # fmt: skip
        return out

    def choose(self, q: Tensor, k: Tensor, rows: Rows, context: AttentionContext) -> Tensor:
        """Return the blocks of each token and head of keys, int32 [B Tq Hk S]."""
        rotary = context.inputs.rotary  # type: ignore[union-attr]
        queries = self._index(context).queries(context.hidden_states, rotary)[:, -q.shape[1] :]
        memory = context.memory
        if isinstance(memory, IndexLayer):
            keys, scale = memory.index()
            return self._choose(queries, keys, scale, rows)
        if rows.tokens != context.hidden_states.shape[1]:
            raise ValueError(
                f"`past_key_values`: attention {self.name!r} keeps index keys in a cache of its "
                "own, which the model makes where none is given"
            )
        return self._choose(queries, self._keys(context), None, rows)

    def compared(self, tokens: int) -> float:
        """Return how many index keys a query is compared with: all of them."""
        return tokens

    def _choose(self, queries: Tensor, keys: Tensor, scale: Tensor | None, rows: Rows) -> Tensor:
        if rows.starts is not None:
            keys = keys.flatten(0, 1)
        return choose_blocks(queries, keys, rows, scale=scale, **self._settings)

    def _keys(self, context: AttentionContext) -> Tensor:
        rotary = context.inputs.rotary  # type: ignore[union-attr]
        return self._index(context).keys(context.hidden_states, rotary)

    def _index(self, context: AttentionContext) -> BlockIndex:
        index = context.module
        if not isinstance(index, BlockIndex) or context.inputs is None:
            raise ValueError(
                f"`attention`: {self.name!r} needs a model whose layers hold its index, as "
                "BitNetForCausalLM"
            )
        return index

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Write the new token and its index key into the memory, choose, and read."""
        if not isinstance(memory, IndexLayer) or not isinstance(layer.module, BlockIndex):
            return "its cache does not keep index keys"
        if not layer.module.is_plain():
            return "its index has another linear or a hook, which a launch would pass over"
        step = super().step(memory, layer)
        if isinstance(step, str) or not memory.is_dense(self.dense_below):
            return step
        launched = step

        def run(tensors: StepTensors) -> Tensor:
            out = launched(tensors)
            _index_step(memory, layer, tensors)
            return out

        return run

    def step_objection(self, memory: Memory) -> str | None:
        """It makes the index keys of its memory."""
        return None

    def step_choice(
        self, memory: Any, layer: StepLayer
    ) -> Callable[[Tensor, StepTensors], Tensor] | str:
        """Return the launches that make the index of a token, and choose by it."""
        from bitnet_triton.kernels.top_blocks.forward import launch_top_blocks
        from bitnet_triton.kernels.top_blocks.op import choice_objection

        objection = choice_objection(memory.keys, memory.index()[0])
        if objection is not None:
            return objection

        def choose(q: Tensor, step: StepTensors) -> Tensor:
            queries = _index_step(memory, layer, step)
            keys, scale = memory.index()
            return launch_top_blocks(
                queries, keys, scale=scale, tokens=memory.stores[0].shape[2],
                sets=layer.kv_heads, leftpad=step.places[LEFTPAD], used=step.places[USED],
                **self._settings,
            )  # fmt: skip

        return choose

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "block": self.block, "selected": self.selected, "initial": self.initial,
            "local": self.local, "units": _TOKENS,
        }  # fmt: skip


def _index_step(memory: Any, layer: StepLayer, step: StepTensors) -> Tensor:
    """Store the index key of the new token; return its index queries [B 1 Hk D]."""
    from bitnet_triton.kernels.top_blocks.index_step import launch_block_index_step

    index: Any = layer.module
    assert step.hidden_states is not None
    keys, scale = memory.index()
    return launch_block_index_step(
        step.hidden_states[:, 0], index.query.weight, index.key.weight, index.query_norm.weight,
        index.key_norm.weight, step.cos, step.sin, keys, scale, step.places[SLOT],
        step.places[POSITION], index.query_norm.eps,
    )  # fmt: skip


def _texts(q: Tensor, rows: Rows, context: AttentionContext) -> tuple[Tensor, Tensor]:
    """Return where the text of each query [B T] starts, and which queries are no padding."""
    B, T = q.shape[:2]
    column = torch.arange(T, device=q.device).expand(B, T)
    if rows.starts is not None:
        place = torch.arange(B * T, device=q.device)
        text = torch.searchsorted(rows.starts[1:].contiguous(), place, right=True)
        start = (rows.starts[text].long() % T).unflatten(0, (B, T))
        return start, torch.ones_like(column, dtype=torch.bool)
    start, is_query = torch.zeros_like(column), torch.ones_like(column, dtype=torch.bool)
    if rows.leftpad is not None:
        start = rows.leftpad[:, None].long().expand(B, T)
        is_query = column >= start
    if context.tokens.used_q is not None:
        is_query = is_query & (column < context.tokens.used_q[:, None])
    return start, is_query
