"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.common.linear import contiguous
from bitnet_triton.kernels.flash_attention.launchers import inner_contiguous
from bitnet_triton.kernels.linear_attention.reference import LEAST_LOG_DECAY, chunked_reference
from bitnet_triton.kernels.linear_attention.reference_backward import (
    chunked_backward_reference,
)
from bitnet_triton.runtime import Implementation

# a program holds whole heads
_LARGEST_HEAD = 256
# tokens that the recurrence takes: a chunk has work for matrix units from then on
_MOST_ONE_BY_ONE = 4

# of q, k, v, log_decay, beta and the initial state
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@functools.cache
def _triton_modules() -> tuple[ModuleType, ModuleType]:
    """Import Triton on first use: that takes longer than this package."""
    from bitnet_triton.kernels.linear_attention import decode, launch

    return decode, launch


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


def _triton_fwd(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    decode, launch = _triton_modules()
    q, k, v = inner_contiguous(q, k, v)
    if cu_seqlens is not None or q.shape[1] > _MOST_ONE_BY_ONE:
        return launch.launch_forward(
            q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, wide
        )
    after = q.new_empty((q.shape[0], k.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=torch.float32) if wide else None
    out = decode.launch_decode(
        q, k, v, log_decay=contiguous(log_decay), beta=contiguous(beta), scale=scale,
        before=contiguous(initial_state), after=after, out=out,
    )  # fmt: skip
    return out, after


def _triton_bwd(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> Gradients:  # fmt: skip
    q, k, v = inner_contiguous(q, k, v)
    return _triton_modules()[1].launch_backward(
        dout, dstate, q, k, v, log_decay, beta, initial_state, cu_seqlens, scale
    )


def triton_objection(q: Tensor, v: Tensor) -> str | None:
    """Say why no kernel computes this; None when one does."""
    widest = max(q.shape[-1], v.shape[-1] - 1)  # beside the values there may be a sum of keys
    return None if widest <= _LARGEST_HEAD else f"heads have at most {_LARGEST_HEAD} values"


LINEAR_FWD = {
    "triton": Implementation(_triton_fwd, triton_objection),
    "reference": Implementation(_reference_fwd),
}
LINEAR_BWD = {
    "triton": Implementation(_triton_bwd, triton_objection),
    "reference": Implementation(_reference_bwd),
}
