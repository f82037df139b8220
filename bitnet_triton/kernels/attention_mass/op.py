"""The public attention_mass: checks, and the choice of a backend."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bitnet_triton.kernels.attention_mass.reference import attention_mass_reference
from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.checks import apart, checked_call
from bitnet_triton.kernels.flash_attention.launchers import (
    inner_contiguous,
    sequences_of,
    settings_of,
    triton_objection,
)
from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.runtime import Implementation, register_op, select

CAUSAL = Mask()


@cache
def _triton_module() -> ModuleType:
    from bitnet_triton.kernels.attention_mass import forward

    return forward


def _triton_fwd(q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Tensor:
    q, k = inner_contiguous(q, k)
    return _triton_module().launch_mass(q, k, lse.contiguous(), call)


def _reference_fwd(q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Tensor:
    q, k = q.float(), k.float()
    if call.cu_seqlens_q is None:
        return attention_mass_reference(q, k, lse, **settings_of(call))
    mass = q.new_zeros(q.shape[1], k.shape[0])
    for i, j, settings in sequences_of(call):
        part = attention_mass_reference(q[None, i], k[None, j], lse[None, :, i], **settings)
        mass[:, j] = part[0]
    return mass


def _objection(q: Tensor, k: Tensor, lse: Tensor, call: Call) -> str | None:
    return triton_objection(q, k, call)


MASS_FWD = {
    "triton": Implementation(_triton_fwd, _objection),
    "reference": Implementation(_reference_fwd),
}


def _launch(q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Tensor:
    if call.is_empty(q, k):
        return _fake(q, k, lse, call).zero_()
    return select("attention_mass", MASS_FWD, q.device, q, k, lse, call)(q, k, lse, call)


def _fake(q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Tensor:
    *lead, Tk, _, _ = k.shape
    return q.new_empty((*lead, q.shape[-2], Tk), dtype=torch.float32)


_attention_mass = register_op("attention_mass", _launch, _fake, bundle=Call)


def attention_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask = CAUSAL,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Sum what each key receives from all queries, without the matrix of probabilities.

    ``sum_i exp(scale q_i k_j - lse_i)`` over the queries that see key j: the columns of what
    ``flash_attention`` computes by rows, and the scores by which H2O evicts (arXiv:2306.14048).
    In float32 and deterministic; it has no gradient.

    Args:
        q: [B Tq H D] float16, bfloat16 or float32; [sum Tq, H, D] for packed sequences.
        k: [B Tk Hk D] in the dtype of ``q``, Hk divides H; [sum Tk, Hk, D].
        lse: [B H Tq] float32, as ``flash_attention`` returns it; [H, sum Tq]. Queries of -inf
            give nothing; one over more keys than these (split attention) gives shares of all.
        mask: as ``flash_attention`` had it; so are all arguments below. Default: causal.
        scale: multiplies the scores. Default: ``D ** -0.5``.
        softcap: largest magnitude of a score.
        cu_seqlens_q: int32 [B + 1].
        cu_seqlens_k: int32 [B + 1].
        leftpad_k: int32 [B].
        seqused_q: int32 [B].
        seqused_k: int32 [B].

    Returns:
        float32 [B H Tk], or [H, sum Tk]: by query head; 0 for keys that are not valid.

    Raises:
        TypeError: as ``flash_attention``, or ``lse`` is not float32.
        ValueError: as ``flash_attention``, or ``lse`` is not [B H Tq].
        BackendUnavailableError: the forced backend cannot run.
    """
    call = checked_call(
        q, k, k, mask, scale, softcap, cu_seqlens_q, cu_seqlens_k, leftpad_k, seqused_q, seqused_k
    )
    check_tensor("lse", lse)
    check_dtype("lse", lse, torch.float32)
    check_device("lse", lse, q.device)
    *lead, Tq, H, _ = q.shape
    sizes = {"H": H, "Tq": Tq} | ({"B": lead[0]} if lead else {})
    check_shape("lse", lse, "B H Tq" if lead else "H Tq", **sizes)
    if torch.compiler.is_compiling():
        k, call = apart(q, k, call)
    return _attention_mass(q.detach(), k.detach(), lse.detach(), call)
