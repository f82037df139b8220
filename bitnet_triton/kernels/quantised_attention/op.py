"""The public attention over codes: checks, and the choice of a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.common.lengths import in_a_row
from bitnet_triton.kernels.flash_attention.launchers import LARGEST_HEAD
from bitnet_triton.kernels.flash_attention.merge import merge_attention
from bitnet_triton.kernels.quantised_attention.codes import KeyValueCodes
from bitnet_triton.kernels.quantised_attention.reference import quantised_attention_reference
from bitnet_triton.kernels.quantize.op import FLOATS
from bitnet_triton.runtime import Implementation, register_op, select
from bitnet_triton.runtime.device import smallest_dot

Results = tuple[Tensor, Tensor]


def _triton_fwd(
    q: Tensor, codes: KeyValueCodes, used: Tensor, scale: float, softcap: float | None,
    more: Results | None,
) -> Results:  # fmt: skip
    from bitnet_triton.kernels.quantised_attention.forward import launch_quantised_attention

    if q.stride(-1) != 1:
        q = q.contiguous()
    if more is not None:
        more = more[0].contiguous(), more[1].contiguous()
    return launch_quantised_attention(q, codes, used, scale=scale, softcap=softcap, more=more)


def _reference_fwd(
    q: Tensor, codes: KeyValueCodes, used: Tensor, scale: float, softcap: float | None,
    more: Results | None,
) -> Results:  # fmt: skip
    out, lse = quantised_attention_reference(q.float(), codes, used, scale=scale, softcap=softcap)
    if more is not None:
        out, lse = merge_attention([out, more[0].float()], [lse, more[1]])
    return out.to(q.dtype), lse


def _objection(q: Tensor) -> str | None:
    on_cpu = smallest_dot(q.device) == 1
    if q.dtype == torch.float32 and not on_cpu:
        return "float32 products of tiles of codes do not fit into the registers of GPUs"
    # larger heads do not fit into them either
    largest = LARGEST_HEAD if on_cpu else LARGEST_HEAD // 2
    return None if q.shape[-1] <= largest else f"heads have at most {largest} values"


QUANTISED_FWD = {
    "triton": Implementation(_triton_fwd, _objection),
    "reference": Implementation(_reference_fwd),
}


def _launch(
    q: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, key_zero: Tensor | None,
    value_scale: Tensor, is_rotated: bool, used: Tensor, scale: float, softcap: float | None,
    more_out: Tensor | None, more_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    codes = KeyValueCodes(keys, values, key_scale, key_zero, value_scale, is_rotated)
    more = None if more_out is None or more_lse is None else (more_out, more_lse)
    if q.numel() == 0:
        B, Tq, H, _ = q.shape
        return torch.empty_like(q), q.new_empty((B, H, Tq), dtype=torch.float32)
    run = select("quantised_attention", QUANTISED_FWD, q.device, q)
    return run(q, codes, used, scale, softcap, more)


def _fake(
    q: Tensor, keys: Tensor, values: Tensor, key_scale: Tensor, key_zero: Tensor | None,
    value_scale: Tensor, is_rotated: bool, used: Tensor, scale: float, softcap: float | None,
    more_out: Tensor | None, more_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


_quantised_attention = register_op("quantised_attention_fwd", _launch, _fake)


def quantised_attention(
    q: Tensor,
    codes: KeyValueCodes,
    used: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    more: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to keys and values that are kept as codes of 8 or 4 bits, and read as such.

    ``softmax(scale q k^T) v`` over what the codes of the first ``used`` tokens of each row stand
    for: every query sees all of them, as they stand before the queries in a text. Rotated codes
    (``hadamard``) meet rotated queries, and what they give is rotated back. Deterministic; there is
    no gradient.

    Args:
        q: [B Tq H D] float16, bfloat16 or float32, not rotated.
        codes: of Hk heads, Hk divides H.
        used: int32 [B], how many tokens of each row have codes.
        scale: multiplies the scores, above 0. Default: ``D ** -0.5``.
        softcap: largest magnitude of a score. Default: no bound.
        more: what attention over other keys has given, ``out`` [B Tq H D] in the dtype of ``q`` and
            ``lse`` [B H Tq]: results are over both then, as ``merge_attention`` has it.

    Returns:
        ``out`` [B Tq H D] in the dtype of ``q``, zeros where a row has no key, and ``lse`` float32
        [B H Tq], the logarithm of the sum of exponentials, -inf there.

    Raises:
        TypeError: ``q`` or ``used`` has a wrong dtype.
        ValueError: shapes or devices do not fit, ``scale`` or ``softcap`` is not positive, or a
            gradient is asked for.
    """
    check_tensor("q", q)
    check_dtype("q", q, *FLOATS)
    check_shape("q", q, "B Tq H D", B=codes.keys.shape[0], D=codes.head_dim)
    H, Hk = q.shape[2], codes.keys.shape[1]
    if H % Hk:
        raise ValueError(f"`codes`: expected heads that divide the {H} of `q`, got {Hk}")
    check_tensor("used", used)
    check_dtype("used", used, torch.int32)
    check_shape("used", used, "B", B=q.shape[0])
    for name, t in (("codes", codes.keys), ("used", used)):
        check_device(name, t, q.device)
    for name, factor in (("scale", scale), ("softcap", softcap)):
        if factor is not None and not factor > 0:
            raise ValueError(f"`{name}`: expected a positive number, got {factor}")
    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("`q`: attention over codes has no gradient; run it under torch.no_grad()")
    out, lse = (None, None) if more is None else more
    if out is not None and lse is not None:
        check_shape("more[0]", out, "B Tq H D", **dict(zip(("B", "Tq", "H", "D"), q.shape)))
        check_shape("more[1]", lse, "B H Tq", B=q.shape[0], H=H, Tq=q.shape[1])
    return _quantised_attention(
        q, codes.keys, codes.values, codes.key_scale, codes.key_zero, codes.value_scale,
        codes.is_rotated, in_a_row(used), q.shape[-1] ** -0.5 if scale is None else scale, softcap,
        out, lse,
    )  # fmt: skip
