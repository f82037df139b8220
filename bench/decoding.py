"""Decoding as it is timed: a cache of a given length, and greedy steps behind it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from bench.llamacpp import LlamaCpp, write_gguf
from bench.models import Shape

# After so many steps a cache is cut back: who is faster would otherwise decode with a longer one
STEPS = 64


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Let PyTorch use every CPU for what is not timed."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prefill(model: PreTrainedModel, ids: Tensor, keep: int) -> tuple[Tensor, DynamicCache]:
    """Read ``ids`` [1 T]; return the logits of the last ``keep`` tokens, and the cache."""
    cache = DynamicCache(config=model.config)
    output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    return output.logits, cache


class Context:
    """Keys and values of the longest context: one model computes them, all get copies.

    Args:
        model: what reads the tokens.
        ids: [1 T], the tokens.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        with all_threads(), torch.no_grad():
            _, self._cache = prefill(model, ids, 1)

    def first(self, tokens: int, config: PreTrainedConfig) -> DynamicCache:
        """Return a cache of the first tokens, in memory of its own."""
        cache = DynamicCache(config=config)
        for i, layer in enumerate(self._cache.layers):
            keys, values = (t[:, :, :tokens].clone() for t in (layer.keys, layer.values))
            cache.update(keys, values, i)
        return cache


class Decoder:
    """Greedy decoding: each call makes one token from the last one and the cache.

    Args:
        model: what decodes.
        cache: of the tokens so far; is kept, and grows.
        token: [1 1], the next one.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache, token: Tensor) -> None:
        self.model, self.cache = model, cache
        self.first = self.token = token
        self.made = 0

    def step(self) -> Tensor:
        """Return the logits after one more token."""
        if self.made == STEPS:
            self.restart()
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        # as `generate` does it: in bfloat16 PyTorch takes five times as long to find the best
        self.token = logits[:, -1].float().argmax(-1, keepdim=True)
        self.made += 1
        return logits

    def restart(self) -> None:
        """Forget what was decoded; a cache that has dropped tokens stays as it is, and as long."""
        if self.made and self.cache.layers[0].keys.shape[2] == self.cache.get_seq_length():
            self.cache.crop(-self.made)
        self.token, self.made = self.first, 0

    def first_step(self) -> Tensor:
        """Return the logits of the first step: later tokens differ where two logits nearly tie."""
        self.restart()
        return self.step()


class LlamaModels:
    """Models of llama.cpp: files and processes are made once, and go with this object.

    Args:
        shape: the widths.
        tokens: that a cache needs room for.
    """

    def __init__(self, shape: Shape, tokens: int) -> None:
        self.shape, self.tokens = shape, tokens
        self._folder = tempfile.TemporaryDirectory()
        self._filled: dict[int, Path] = {}
        self._running: dict[str, LlamaCpp] = {}

    def path(self, head: str) -> Path:
        """Return the GGUF with a head of this format."""
        path = Path(self._folder.name) / f"{head}.gguf"
        if not path.exists():
            write_gguf(path, self.shape, head=head)
        return path

    def get(self, head: str) -> LlamaCpp:
        """Return a loaded model that computes with as many threads as PyTorch."""
        threads = torch.get_num_threads()
        if head not in self._running:
            self._running[head] = LlamaCpp(self.path(head), threads=threads, context=self.tokens)
        self._running[head].set_threads(threads)
        return self._running[head]

    def fill(self, peer: LlamaCpp, tokens: int) -> None:
        """Give a model a cache of so many tokens: computed once, by all threads, then copied."""
        if tokens not in self._filled:
            peer.set_threads(os.cpu_count() or 1)
            peer.prefill(tokens)
            peer.set_threads(torch.get_num_threads())
            self._filled[tokens] = Path(self._folder.name) / f"{tokens}.state"
            peer.save(self._filled[tokens])
        else:
            peer.restore(self._filled[tokens])


class LlamaDecoder:
    """Greedy decoding in llama.cpp, cut back like ``Decoder``.

    Args:
        models: which the model belongs to.
        head: format of its head.
        context: tokens in its cache.
    """

    def __init__(self, models: LlamaModels, head: str, context: int) -> None:
        self.peer, self.context, self.made = models.get(head), context, 0
        models.fill(self.peer, context)

    def step(self) -> None:
        """Make one more token."""
        if self.made == STEPS:
            self.peer.crop(self.context)
            self.made = 0
        self.peer.decode()
        self.made += 1
