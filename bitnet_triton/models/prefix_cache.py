"""Texts that are read once: caches in pages that begin with what a pool has read before."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.cache import Batch, PagedLayer, Pages, PrefixTree, Tables
from bitnet_triton.cache.pages import paged_layers
from bitnet_triton.cache.pages.tree import Node
from bitnet_triton.models.beside import adapted_layers, content, without_wrapper
from bitnet_triton.models.rotary import bind, fix_frequencies


class PrefixCache:
    """Keys and values of texts that a model has read, for whoever comes with the same beginning.

    ``cache`` gives a cache for ``generate`` that begins with what is known of a prompt; ``keep``
    takes over what a cache holds in the end. Pages are shared, never copied whole: rows that are
    alike, as of beams or samples, read one and the same until they part.

    Args:
        model: ``BitNetForCausalLM`` with attention "full" in all layers.
        tokens: how many there is room for, in kept texts and running ones together.
        page_size: tokens of a page, a power of two, at least 16. Whole pages are kept.
        context_length: for rope types that go by the length of a text, the tokens that each text
            will have at most; ``generate`` with the same writes the same. Default:
            ``config.max_position_embeddings``.

    Raises:
        ValueError: a layer's attention does not read everything, the model has no attention plan,
            or ``context_length`` is no number of tokens, or told to a model that does not depend on
            it.
    """

    def __init__(
        self,
        model: Any,
        tokens: int = 65536,
        *,
        page_size: int = 16,
        context_length: int | None = None,
    ) -> None:
        inner = without_wrapper(model)
        kind = Pages(page_size=page_size, tokens=tokens)
        _check_plan(inner, kind)
        self._inner, self._kind = inner, kind
        self._decoder, self._model = inner.base_model, model
        self._layers = inner.config.num_hidden_layers
        rotary = self._decoder.rotary_emb
        if context_length is not None and not rotary.depends_on_length:
            raise ValueError(
                f"`context_length`: expected none, rope type {rotary.rope_type!r} does not depend "
                "on it"
            )
        whole = isinstance(context_length, int) and not isinstance(context_length, bool)
        if context_length is not None and not (whole and context_length > 0):
            raise ValueError(f"`context_length`: expected tokens, got {context_length!r}")
        self._context_length = context_length
        self.pool = kind.pool()
        self.tree = PrefixTree(self.pool)

    def cache(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        namespace: Hashable = None,
    ) -> Cache:
        """Return a cache that begins with what is known of a prompt, for ``past_key_values``.

        What all rows have in common, and what equal rows have, is read once, here. At least the
        last token of each row is left to ``generate``. With padding, a row that is shorter than
        another begins with fewer tokens: a cache has as many columns in all rows.

        Args:
            input_ids: int64 [B T]; for beams or samples, each row as often as ``generate`` will
                have it (``repeat_interleave``).
            attention_mask: [B T], padding to the left. Default: there is none.
            namespace: texts of different ones never meet: a user, a salt. What keys depend on
                (adapters, rotary settings, dtype) is part of it in any case.

        Raises:
            OutOfPagesError: there is no room for what rows have in common.
            ValueError: padding stands elsewhere than on the left.
        """
        ids = _ids(input_ids, 2)
        left = _padding(attention_mask, ids.shape)
        space = self._namespace(namespace)
        rows = [row[start:-1] for row, start in zip(ids, left.tolist())]
        self._read_common(rows, space)
        cache = self._begin(ids, left, rows, space)
        distinct, index = _distinct(rows, left)
        if len(distinct) < len(rows) and cache.get_seq_length() < ids.shape[1] - 1:
            # equal rows are read once, and then shared
            cache = self._begin(ids[distinct], left[distinct], [rows[i] for i in distinct], space)
            self._read(cache, ids[distinct, :-1], left[distinct])
            cache.batch_select_indices(torch.from_numpy(index))
            self._batch_of(cache).origin = None  # what rows begin with is told of them as they are
        cast("Any", cache)._begins_with = space, ids[:, : cache.get_seq_length()]
        return cache

    def keep(self, cache: Cache, input_ids: Tensor) -> None:
        """Keep what a cache holds, in whole pages, for prompts to come.

        Its pages that are not kept go back to the pool when nobody holds the cache any more. Of a
        cache whose rows have changed places, as those of a beam search do, what ``cache`` has read
        is kept and nothing behind it: nobody knows whose tokens stand there.

        Args:
            cache: of ``cache``.
            input_ids: int64 [B T], what stands in its rows, padding included: what ``generate``
                has returned for them, or the beginning of it. Behind what ``cache`` has read, they
                are taken on trust.

        Raises:
            ValueError: the cache is another one, ``input_ids`` do not begin as its rows do, or the
                model has another attention, other adapters or rotary settings now.
        """
        batch, (space, known) = self._batch_of(cache), cast("Any", cache)._begins_with
        ids, tables = _ids(input_ids, 2), batch.tables
        if space != self._namespace(space[0]):
            raise ValueError(
                "`cache`: it was made with another attention, other adapters or rotary settings"
            )
        if tables is None:
            return
        if len(ids) != tables.rows:
            raise ValueError(f"`input_ids`: the cache has {tables.rows} rows, got {len(ids)}")
        columns = batch.columns
        if batch.origin is not None:
            known = known[batch.origin]
            columns = min(columns, known.shape[1])
        shared = min(known.shape[1], ids.shape[1])
        if (known[:, :shared] != ids[:, :shared]).any():
            raise ValueError("`input_ids`: the cache begins with other tokens")
        for row, start in enumerate(batch.left.tolist()):
            self.tree.insert(ids[row, start:columns], tables.pages_of(row), space)

    def pin(self, input_ids: Tensor, *, namespace: Hashable = None) -> None:
        """Read a text [T], such as a system prompt, and keep it whatever comes, in whole pages."""
        tokens, space = _ids(input_ids, 1), self._namespace(namespace)
        self._read_text(tokens, space)
        self.tree.pin(self._find(tokens, space))

    def unpin(self, input_ids: Tensor, *, namespace: Hashable = None) -> None:
        """Take ``pin`` back: the text goes when its time has come.

        Raises:
            ValueError: the text is not pinned.
        """
        node = self._find(_ids(input_ids, 1), self._namespace(namespace))
        if not node.pins:
            raise ValueError("`input_ids`: expected a text that is pinned, got another one")
        self.tree.unpin(node)

    def clear(self) -> None:
        """Forget all texts, pinned or not: after a change of weights, which nobody notices here."""
        self.tree.clear()

    # ---

    def _namespace(self, given: Hashable) -> tuple[Hashable, ...]:
        """Return what keys depend on beside the tokens before them.

        Raises:
            ValueError: the model has an attention now that does not go with shared prefixes.
        """
        plan = _check_plan(self._inner, self._kind)
        rotary, tuned = self._decoder.rotary_emb, []
        for name, module in adapted_layers(self._model):
            merged = tuple(getattr(module, "merged_adapters", ()))
            active = () if module.disable_adapters else tuple(module.active_adapters)
            tuned.append((name, active, merged, content(module, active)))
        parameters = json.dumps(rotary.rope_parameters, sort_keys=True, default=str)
        length = self._length if rotary.depends_on_length else None
        modes = plan.prefill, plan.decode
        return given, tuple(tuned), parameters, length, str(self._decoder.dtype), modes

    @property
    def _length(self) -> int:
        """Return how many tokens a text will have at most."""
        return self._context_length or int(self._inner.config.max_position_embeddings)

    def _new(self, batch: Batch) -> Cache:
        cache = Cache(paged_layers(batch, self._layers))
        rotary = self._decoder.rotary_emb
        bind(rotary, cache)
        if rotary.depends_on_length:
            fix_frequencies(rotary, cache, self._length)
        return cache

    def _begin(
        self, ids: np.ndarray, left: np.ndarray, rows: list[np.ndarray], space: Hashable
    ) -> Cache:
        """Return a cache of as many columns as the tree has of every row."""
        found = [self.tree.match(row, space)[0] for row in rows]
        held = [len(pages) * self.pool.page_size for pages in found]
        columns = int(min((left + held).min(), ids.shape[1] - 1))
        batch = Batch(self.pool)
        if columns:
            batch.tables = Tables(self.pool, len(rows))
            batch.columns, batch.left = columns, left
        for row, pages in enumerate(found):
            if batch.tables is None:
                self.pool.release(pages)
            else:
                batch.tables.put(row, pages, int(max(columns - left[row], 0)))
        return self._new(batch)

    def _read(self, cache: Cache, ids: np.ndarray, left: np.ndarray) -> None:
        """Read the columns of ``ids`` [B T] that a cache does not hold."""
        held, device = cache.get_seq_length(), self._decoder.device
        every = np.arange(ids.shape[1])
        mask = torch.from_numpy((every >= left[:, None]).astype(np.int64)).to(device)
        positions = torch.from_numpy(np.maximum(every[held:] - left[:, None], 0)).to(device)
        with torch.no_grad():
            self._decoder(
                input_ids=torch.from_numpy(ids[:, held:]).to(device), attention_mask=mask,
                position_ids=positions, past_key_values=cache, use_cache=True,
            )  # fmt: skip

    def _read_text(self, tokens: np.ndarray, space: Hashable) -> None:
        """Read a text, as far as the tree does not have it, in whole pages, and put it there."""
        whole = tokens[: len(tokens) // self.pool.page_size * self.pool.page_size]
        left = np.zeros(1, dtype=np.int64)
        cache = self._begin(np.append(whole, 0)[None], left, [whole], space)
        if cache.get_seq_length() < len(whole):
            self._read(cache, whole[None], left)
            tables = self._batch_of(cache).tables
            assert tables is not None
            self.tree.insert(whole, tables.pages_of(0), space)

    def _read_common(self, rows: list[np.ndarray], space: Hashable) -> None:
        """Read what several rows have in common, if it is a page or more."""
        if len(rows) < 2:
            return
        shortest = min(map(len, rows))
        same = np.array([row[:shortest] for row in rows])
        differs = (same != same[0]).any(0)
        self._read_text(rows[0][: int(differs.argmax()) if differs.any() else shortest], space)

    def _find(self, tokens: np.ndarray, space: Hashable) -> Node:
        pages, node = self.tree.match(tokens, space)
        self.pool.release(pages)
        return node

    def _batch_of(self, cache: Cache) -> Batch:
        layers: list[Any] = cache.layers
        if not layers or not all(isinstance(layer, PagedLayer) for layer in layers):
            raise ValueError("`cache`: expected one of `PrefixCache.cache`")
        if layers[0].batch.pool is not self.pool:
            raise ValueError("`cache`: its pages are those of another pool")
        return layers[0].batch


def _ids(input_ids: Tensor, dims: int) -> np.ndarray:
    wanted = "[T]" if dims == 1 else "[B T]"
    if not isinstance(input_ids, Tensor) or input_ids.ndim != dims:
        got = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids`: expected a tensor {wanted}, got {got}")
    return input_ids.cpu().numpy()


def _check_plan(model: Any, kind: Pages) -> AttentionPlan:
    plan: AttentionPlan | None = getattr(model, "attention_plan", None)
    if plan is None:
        raise ValueError(
            "`model`: expected BitNetForCausalLM with `config.attention`; choose one, as by "
            "bitnet_triton.set_attention(model, 'full')"
        )
    layers = model.config.num_hidden_layers
    paged = AttentionPlan(plan.prefill, plan.decode, cache=kind)
    paged.check_layers(layers)
    for index in range(layers):
        if not paged.memory(index).is_paged:
            name = plan.mode(index, "prefill").name
            raise ValueError(
                f"`model`: layer {index} with attention {name!r} keeps a window: what it holds "
                "of a beginning depends on what came behind it"
            )
    return plan


def _padding(mask: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """Return int64 [B], the padding in front of each row."""
    if mask is None:
        return np.zeros(shape[0], dtype=np.int64)
    is_token = mask.cpu().numpy() != 0
    left = (~is_token).sum(1).astype(np.int64)
    if is_token.shape != shape or (is_token != (np.arange(shape[1]) >= left[:, None])).any():
        raise ValueError(f"`attention_mask`: expected {list(shape)} with padding to the left only")
    return left


def _distinct(rows: list[np.ndarray], left: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Return the first of each kind of rows, and of which kind every row is."""
    kinds: dict[tuple[bytes, int], int] = {}
    firsts: list[int] = []
    index = []
    for i, (row, start) in enumerate(zip(rows, left.tolist())):
        kind = kinds.setdefault((row.tobytes(), start), len(firsts))
        if kind == len(firsts):
            firsts.append(i)
        index.append(kind)
    return firsts, np.array(index)
