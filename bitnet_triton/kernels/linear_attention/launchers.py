"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.linear_attention.reference import LEAST_LOG_DECAY, chunked_reference
from bitnet_triton.kernels.linear_attention.reference_backward import (
    chunked_backward_reference,
)
from bitnet_triton.runtime import Implementation

# of q, k, v, log_decay, beta and the initial state
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _sequences(
    tokens: tuple[Tensor | None, ...], cu_seqlens: Tensor | None
) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield what belongs to the tokens of each packed sequence as a batch of one; else all."""
    if cu_seqlens is None:
        yield tokens
        return
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        yield tuple(None if t is None else t[None, start:end] for t in tokens)


def _joined(results: Sequence[Tensor | None], packed: bool) -> Tensor | None:
    """Return what all sequences have found of their tokens, as one tensor."""
    known = [t for t in results if t is not None]
    if not packed or not known:
        return results[0]
    return torch.cat([t[0] for t in known])


def _of_sequence(state: Tensor | None, b: int, cu_seqlens: Tensor | None) -> Tensor | None:
    return state if state is None or cu_seqlens is None else state[b : b + 1]


def _settings(tokens: Any, state: Tensor | None) -> tuple[Any, dict[str, Any]]:
    q, k, v, log_decay, beta = tokens
    if log_decay is not None:
        log_decay = log_decay.clamp_min(LEAST_LOG_DECAY)
    return (q, k, v), {"log_decay": log_decay, "beta": beta, "initial_state": state}


def _wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.float() for t in tensors)


def _reference_fwd(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    results = []
    for b, own in enumerate(_sequences(_wide(q, k, v, log_decay, beta), cu_seqlens)):
        tensors, settings = _settings(own, _of_sequence(initial_state, b, cu_seqlens))
        results.append(chunked_reference(*tensors, **settings, scale=scale))
    outs, states = zip(*results)
    out = _joined(outs, cu_seqlens is not None)
    assert out is not None
    return out if wide else out.to(q.dtype), torch.cat(states)


def _reference_bwd(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> Gradients:  # fmt: skip
    given = (q, k, v, log_decay, beta, initial_state)
    wide = (dout.float(), *_wide(*given[:-1]))
    results = []
    own: Any
    for b, own in enumerate(_sequences(wide, cu_seqlens)):
        later = _of_sequence(dstate, b, cu_seqlens)
        tensors, settings = _settings(own[1:], _of_sequence(initial_state, b, cu_seqlens))
        results.append(chunked_backward_reference(own[0], later, *tensors, **settings, scale=scale))
    *tokens, before = zip(*results)
    found: list[Any] = [_joined(t, cu_seqlens is not None) for t in tokens]
    found.append(None if initial_state is None else torch.cat(before))
    return tuple(  # type: ignore[return-value]
        q.new_empty([0]) if t is None else grad.to(t.dtype) for t, grad in zip(given, found)
    )


LINEAR_FWD = {"reference": Implementation(_reference_fwd)}
LINEAR_BWD = {"reference": Implementation(_reference_bwd)}
