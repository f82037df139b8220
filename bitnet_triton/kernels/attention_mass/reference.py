"""What each key receives, by the formula (arXiv:2306.14048): the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.kernels.flash_attention.pairs import Lengths


def attention_mass_reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    leftpad_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Sum the probabilities of q [B Tq H D] over k [B Tk Hk D] by keys, with lse [B H Tq]."""
    lengths = Lengths(q.shape[1], k.shape[1], leftpad_k, seqused_q, seqused_k)
    # memory beside the valid keys may hold anything
    k = torch.where(lengths.valid(k.device)[1][:, :, None, None], k, torch.zeros_like(k))
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = mask.visible_among(lengths, q.device).expand(scores.shape)
    is_row = (lse > float("-inf"))[..., None]
    pivot = lse[..., None].masked_fill(~is_row, 0.0)
    weights = (scores - pivot).masked_fill(~(visible & is_row), float("-inf")).exp()
    return weights.sum(dim=2)
