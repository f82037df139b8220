"""The launchers of each backend, and the tables that ``select`` chooses from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.launchers import LARGEST_HEAD, inner_contiguous
from bitnet_triton.kernels.lsh_attention.arguments import BucketCall
from bitnet_triton.kernels.lsh_attention.reference import union_attention, unit_keys
from bitnet_triton.runtime import Implementation
from bitnet_triton.runtime.device import smallest_dot

# pairs at a time: what the formula takes does not grow with the square of the length
_PAIRS = 2**24


def _valid(qk: Tensor, call: BucketCall, *tensors: Tensor) -> list[Tensor]:
    """Return tensors [B T H D] in float32, zeros for padding: 0 * NaN would leak into sums."""
    is_token = (call.low[0] < qk.shape[1]).transpose(1, 2)[..., None]
    return [torch.where(is_token, t.float(), 0.0) for t in tensors]


def _unions(qk: Tensor, call: BucketCall) -> Iterator[tuple[slice, Tensor]]:
    """Yield some queries at a time, and which pairs [B H rows T] any round has found."""
    B, T, H, _ = qk.shape
    step = max(_PAIRS // (B * H * T), 1)
    for start in range(0, T, step):
        rows = slice(start, min(start + step, T))
        union = torch.zeros(B, H, rows.stop - start, T, dtype=torch.bool, device=qk.device)
        for rank, low, high in zip(call.rank, call.low, call.high):
            place = rank[:, :, None]
            union |= (place >= low[..., rows, None]) & (place <= high[..., rows, None])
        yield rows, union


def _reference_fwd(qk: Tensor, v: Tensor, call: BucketCall) -> tuple[Tensor, Tensor]:
    x, values = _valid(qk, call, qk, v)
    keys = unit_keys(x)
    parts = [
        union_attention(x, keys, values, union, rows, scale=call.scale)[0]
        for rows, union in _unions(x, call)
    ]
    B, T, H, _ = qk.shape
    # only the kernels' backward reads it
    return torch.cat(parts, 1).to(v.dtype), x.new_zeros(B, H, T)


def _reference_bwd(
    dout: Tensor, qk: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: BucketCall
) -> tuple[Tensor, Tensor]:
    x, values, dout = _valid(qk, call, qk, v, dout)
    keys = unit_keys(x)
    dq, dk, dv = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(values)
    for rows, union in _unions(x, call):
        part, weights = union_attention(x, keys, values, union, rows, scale=call.scale)
        alone = (~weights.any(-1) & union.any(-1)).transpose(1, 2)[..., None]
        delta = (dout[:, rows] * part).sum(-1).transpose(1, 2)[..., None]
        dweights = torch.einsum("bihd,bjhd->bhij", dout[:, rows], values)
        dscores = weights * (dweights - delta) * call.scale
        dq[:, rows] = torch.einsum("bhij,bjhd->bihd", dscores, keys)
        dk += torch.einsum("bhij,bihd->bjhd", dscores, x[:, rows])
        dv += torch.einsum("bhij,bihd->bjhd", weights, dout[:, rows])
        dv[:, rows] += dout[:, rows] * alone
    dk -= keys * (keys * dk).sum(-1, keepdim=True)
    norm = x.norm(dim=-1, keepdim=True)
    dqk = dq + torch.where(norm > 0, dk / norm.where(norm > 0, 1.0), 0.0)
    return dqk.to(qk.dtype), dv.to(v.dtype)


def inverse_norms(qk: Tensor) -> Tensor:
    """Return one over the length of each vector of qk [B T H D], float32 [B H T]; 0 for zeros."""
    norms = torch.linalg.vector_norm(qk, dim=-1, dtype=torch.float32).transpose(1, 2)
    return torch.where(norms > 0, norms.reciprocal(), 0.0).contiguous()


def _triton_fwd(qk: Tensor, v: Tensor, call: BucketCall) -> tuple[Tensor, Tensor]:
    # Triton is imported on first use, here and below: that takes longer than this package
    from bitnet_triton.kernels.lsh_attention.forward import launch_forward

    qk, v = inner_contiguous(qk, v)
    return launch_forward(qk, v, inverse_norms(qk), call)


def _triton_bwd(
    dout: Tensor, qk: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: BucketCall
) -> tuple[Tensor, Tensor]:
    from bitnet_triton.kernels.lsh_attention.backward import launch_backward

    qk, v = inner_contiguous(qk, v)
    dout, out, lse = (t.contiguous() for t in (dout, out, lse))
    return launch_backward(dout, qk, v, inverse_norms(qk), out, lse, call)


def _triton_objection(qk: Tensor, v: Tensor) -> str | None:
    widest, largest = max(qk.shape[-1], v.shape[-1]), LARGEST_HEAD
    if qk.dtype == torch.float32 and smallest_dot(qk.device) > 1:
        # products of float32 run in registers there, and larger heads do not fit into them
        largest //= 2
    return None if widest <= largest else f"heads have at most {largest} values"


BUCKET_FWD = {
    "triton": Implementation(_triton_fwd, _triton_objection),
    "reference": Implementation(_reference_fwd),
}
BUCKET_BWD = {
    "triton": Implementation(_triton_bwd, _triton_objection),
    "reference": Implementation(_reference_bwd),
}
