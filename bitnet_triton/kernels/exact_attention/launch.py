"""Start the kernels of exact attention; the mask has one band."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.exact_attention.arguments import ExactCall
from bitnet_triton.kernels.exact_attention.backward import (
    _exact_attention_bwd_dkdv_kernel,
    _exact_attention_bwd_dq_kernel,
)
from bitnet_triton.kernels.exact_attention.forward import _exact_attention_fwd_kernel
from bitnet_triton.kernels.exact_attention.select import launch_select
from bitnet_triton.kernels.flash_attention.bands import dense_band
from bitnet_triton.kernels.flash_attention.launch import (
    key_passes,
    launch_delta,
    repeated_keys,
    results,
    row_tiles,
    start_keys,
    start_rows,
    summed_keys,
)
from bitnet_triton.kernels.flash_attention.prepare import prepare_call


def launch_forward(q: Tensor, k: Tensor, v: Tensor, exact: ExactCall) -> tuple[Tensor, Tensor]:
    """Map q, k, v to out in the dtype of ``q`` and lse in float32."""
    call = exact.call
    prepared = prepare_call(q, k, call)
    cuts = launch_select(q, k, exact, prepared)
    out, lse = results(q, v, prepared, q.dtype)
    config = row_tiles("exact_attention_fwd", q, v)
    kernel, tensors = _exact_attention_fwd_kernel, (q, k, v, out, lse, cuts)
    start_rows(kernel, config, tensors, call, prepared, prepared.bands[0])
    if prepared.rows is not None:
        start_rows(
            kernel, config, tensors, call, prepared, dense_band(call.mask.causal), dense=True
        )
    return out, lse


def launch_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    exact: ExactCall,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v in their dtypes; what was taken is selected again."""
    call = exact.call
    prepared = prepare_call(q, k, call)
    Hk = k.shape[-2]
    k, v = repeated_keys(prepared, q, k, v)
    cuts = launch_select(q, k, exact, prepared)
    pivot, delta = launch_delta(dout, dlse, out, lse)
    inputs = (q, k, v, dout, pivot, delta, cuts)

    make = torch.zeros if prepared.zeroed else torch.empty
    dq = make(q.shape, dtype=q.dtype, device=q.device)
    config = row_tiles("exact_attention_bwd_dq", q, v)
    kernel, tensors = _exact_attention_bwd_dq_kernel, (*inputs, dq)
    start_rows(kernel, config, tensors, call, prepared, prepared.bands[0])
    if prepared.rows is not None:
        start_rows(
            kernel, config, tensors, call, prepared, dense_band(call.mask.causal), dense=True
        )

    passes = key_passes(call, prepared)
    # what several launches add up is rounded once, at the end
    wide = len(passes) > 1 or k.shape[-2] != Hk
    dtype = torch.float32 if wide else q.dtype
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=k.device) for t in (k, v))
    config = row_tiles("exact_attention_bwd_dkdv", k, v)
    for one in passes:
        start_keys(
            _exact_attention_bwd_dkdv_kernel, config, (*inputs, dk, dv), call, prepared, *one
        )
    dk, dv = summed_keys(dk, dv, Hk)
    return dq, dk.to(q.dtype), dv.to(q.dtype)
