"""Running a step ahead: a GPU works on the next token while Python looks at the last one.

To read a value from a GPU is to wait until it has caught up, and then it waits for Python in turn.
So greedy decoding starts a step before it reads whether the step before was the last one; if it
was, the step is taken back out of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from bitnet_triton.cache import Memory, grow_in_place


def can_run_ahead(device: torch.device, cache: Cache) -> bool:
    """Tell whether it pays, and whether ``cache`` can forget a token again.

    Plain layers of transformers grow in place from here on, as in every fused decoder.
    """
    if device.type != "cuda" or type(cache) not in (Cache, DynamicCache):
        return False
    grow_in_place(cache)
    return all(isinstance(layer, Memory) and layer.can_take_back(1) for layer in cache.layers)


def longest(stopping_criteria: Any) -> int | None:
    """Return the number of tokens at which a criterion stops, which Python knows beforehand."""
    lengths = [criterion.max_length for criterion in stopping_criteria if _is_length(criterion)]
    return min(lengths, default=None)


def _is_length(criterion: Any) -> bool:
    return isinstance(getattr(criterion, "max_length", None), int)


class Told:
    """A small tensor on its way to the CPU, while the GPU is given more to do."""

    def __init__(self, value: Tensor) -> None:
        # elsewhere nothing would tell when it is there
        self._value = value.to("cpu", non_blocking=value.is_cuda)
        self._event = None
        if value.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

    def read(self) -> Tensor:
        """Wait for it; the work that was started after it goes on."""
        if self._event is not None:
            self._event.synchronize()
        return self._value


class StepAhead:
    """A step that has been started, and may turn out not to be wanted.

    Args:
        step: maps ids [B T] to the tokens [B] behind them, and adds one token to ``cache``.
        ids: int64 [B T].
        cache: of the step.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], ids: Tensor, cache: Cache) -> None:
        self._cache = cache
        self._result: Tensor | Exception
        try:
            self._result = step(ids)
        except Exception as error:  # a text that has ended does not need it
            self._result = error

    def take(self) -> Tensor:
        """Return its tokens, or raise what it has raised."""
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def take_back(self) -> None:
        """Make the cache what it was."""
        if not isinstance(self._result, Exception):
            self._cache.crop(-1)

    def wait(self) -> None:
        """Wait until nothing of it runs any more: it writes behind what the cache holds."""
        if not isinstance(self._result, Exception):
            Told(self._result).read()
