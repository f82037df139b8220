"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

import functools
from dataclasses import replace

from torch import Tensor

from bitnet_triton.kernels.exact_attention.arguments import ExactCall
from bitnet_triton.kernels.exact_attention.reference import select_reference
from bitnet_triton.kernels.flash_attention.bands import bands_of
from bitnet_triton.kernels.flash_attention.launchers import (
    Gradients,
    inner_contiguous,
    positive_scale,
    reference_bwd,
    reference_fwd,
    triton_objection,
)
from bitnet_triton.kernels.flash_attention.reference import Select
from bitnet_triton.runtime import Implementation


def _triton_fwd(q: Tensor, k: Tensor, v: Tensor, exact: ExactCall) -> tuple[Tensor, Tensor]:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.exact_attention.launch import launch_forward

    q, k, v = inner_contiguous(q, k, v)
    q, call = positive_scale(q, exact.call)
    return launch_forward(q, k, v, replace(exact, call=call))


def _triton_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    exact: ExactCall,
) -> Gradients:  # fmt: skip
    from bitnet_triton.kernels.exact_attention.launch import launch_backward

    dlse = None if dlse is None else dlse.contiguous()
    q, k, v = inner_contiguous(q, k, v)
    out, lse = out.contiguous(), lse.contiguous()
    return launch_backward(dout.contiguous(), dlse, q, k, v, out, lse, exact)


def _triton_objection(q: Tensor, v: Tensor, exact: ExactCall) -> str | None:
    mask = exact.call.mask
    if len(bands_of(mask)) > 1:
        # its rows are those of several launches, of which none sees all scores
        return f"no kernel selects scores (top_k, threshold) under pattern {mask.pattern!r}"
    return triton_objection(q, v, exact.call)


def _selection(exact: ExactCall) -> Select:
    return functools.partial(select_reference, top_k=exact.top_k, threshold=exact.threshold)


def _reference_fwd(q: Tensor, k: Tensor, v: Tensor, exact: ExactCall) -> tuple[Tensor, Tensor]:
    return reference_fwd(q, k, v, exact.call, _selection(exact))


def _reference_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    exact: ExactCall,
) -> Gradients:  # fmt: skip
    return reference_bwd(dout, dlse, q, k, v, out, lse, exact.call, _selection(exact))


EXACT_FWD = {
    "triton": Implementation(_triton_fwd, _triton_objection),
    "reference": Implementation(_reference_fwd),
}
EXACT_BWD = {
    "triton": Implementation(_triton_bwd, _triton_objection),
    "reference": Implementation(_reference_bwd),
}
