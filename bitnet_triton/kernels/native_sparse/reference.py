"""Native Sparse Attention in plain PyTorch (arXiv:2502.11089, section 3): the oracle of the tests.

Positions count from 0. The paper prints the index of eq. 9 as if they counted from 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.kernels.flash_attention.mask import Mask
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.kernels.native_sparse.blocks import SparseBlocks, count_blocks


def compress_reference(
    x: Tensor,
    *,
    block: int,
    stride: int,
    weights: Tensor | None = None,
    linear: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Map x [B T Hk D] to one vector for each block (eq. 7), [B N Hk D'].

    ``positions`` [Hk block D] is added to the tokens of a block. Then one of: the mean; a sum with
    ``weights`` [Hk block]; ``linear`` [Hk block D D'] over all tokens at once; ``mlp``, the same
    [Hk block D E] and after a GELU [Hk E D'].
    """
    count = count_blocks(x.shape[1], block, stride)
    if count == 0:
        blocks = x.new_zeros(x.shape[0], 0, *x.shape[2:], block)
    else:
        blocks = x.unfold(1, block, stride)[:, :count]
    blocks = blocks.movedim(-1, 3)  # [B N Hk block D]
    if positions is not None:
        blocks = blocks + positions
    if weights is not None:
        return torch.einsum("bnhrd,hr->bnhd", blocks, weights)
    if linear is not None:
        return torch.einsum("bnhrd,hrde->bnhe", blocks, linear)
    if mlp is not None:
        hidden = F.gelu(torch.einsum("bnhrd,hrde->bnhe", blocks, mlp[0]))
        return torch.einsum("bnhe,hed->bnhd", hidden, mlp[1])
    return blocks.mean(3)


def compressed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, blocks: SparseBlocks, scale: float, before: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to compressed keys k, v [B N Hk D] whose blocks lie in the past as a whole (eq. 8).

    The first query of q [B T H D] stands at position ``before``; a block is seen from its last
    token on. Returns out [B T H Dv], lse [B H T] and the weights [B H T N].
    """
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) * scale
    t = torch.arange(q.shape[1], device=q.device) + before
    ends = torch.arange(k.shape[1], device=q.device) * blocks.stride + blocks.block - 1
    visible = (ends <= t[:, None]).expand(scores.shape)
    empty = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))
    return torch.einsum("bhtn,bnhd->bthd", weights, v), lse, weights


def block_scores_reference(weights: Tensor, *, blocks: SparseBlocks, Hk: int, count: int) -> Tensor:
    """Map compressed weights p [B H T N] to scores of ``count`` selection blocks, [B Hk T count].

    Eq. 9 and 10: block j collects ``sum_m sum_r p[ratio j + m - r]``, m over its stride units and r
    over those of a compression block, summed over the heads of a group.
    """
    B, H, T, N = weights.shape
    scores = weights.new_zeros(B, H, T, count)
    for j in range(count):
        for m in range(blocks.selection // blocks.stride):
            for r in range(blocks.block // blocks.stride):
                i = blocks.ratio * j + m - r
                if 0 <= i < N:
                    scores[..., j] += weights[..., i]
    return scores.unflatten(1, (Hk, H // Hk)).sum(2)


def select_reference(scores: Tensor, *, blocks: SparseBlocks, before: int = 0) -> Tensor:
    """Choose the blocks of the largest scores [B Hk T count], int32 [B T Hk selected] (eq. 11).

    The first and the latest blocks come first, then others by falling score, of equal ones the
    earlier; -1 where there are no more.
    """
    T, count = scores.shape[2:]
    own = (torch.arange(T, device=scores.device) + before)[:, None] // blocks.selection
    j = torch.arange(count, device=scores.device)
    forced = (j < blocks.initial) | (j > own - blocks.local)
    scores = scores.masked_fill(forced, float("inf")).masked_fill(j > own, float("-inf"))
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)[..., : blocks.selected]
    missing = scores.gather(-1, order) == float("-inf")
    order = F.pad(order.masked_fill(missing, -1), (0, blocks.selected - order.shape[-1]), value=-1)
    return order.transpose(1, 2).int()


def selection_reference(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, block: int, scale: float
) -> Tensor:
    """Attend to the tokens up to oneself of the chosen blocks (eq. 12)."""
    Tq, Tk, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    j = torch.arange(Tk, device=q.device)
    t = torch.arange(Tq, device=q.device)[:, None] + Tk - Tq
    chosen = (j // block == indices[..., None]).any(-2)  # [B Tq Hk Tk]
    visible = chosen.transpose(1, 2).repeat_interleave(G, dim=1) & (j <= t)
    return attention_reference(
        q, k, v, mask=Mask(), scale=scale, select=lambda scores, shown: shown & visible
    )[0]


def native_sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_compressed: Tensor,
    v_compressed: Tensor,
    gates: Tensor,
    *,
    blocks: SparseBlocks,
    k_window: Tensor | None = None,
    v_window: Tensor | None = None,
    scale: float,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the three branches by their gates (eq. 5), [B T H Dv]; return the chosen blocks too."""
    before = k.shape[1] - q.shape[1]
    compressed, _, weights = compressed_attention_reference(
        q, k_compressed, v_compressed, blocks=blocks, scale=scale, before=before
    )
    if indices is None:
        count = -(-k.shape[1] // blocks.selection)
        scores = block_scores_reference(weights.detach(), blocks=blocks, Hk=k.shape[2], count=count)
        indices = select_reference(scores, blocks=blocks, before=before)
    selected = selection_reference(q, k, v, indices, block=blocks.selection, scale=scale)
    k_window = k if k_window is None else k_window
    v_window = v if v_window is None else v_window
    window = attention_reference(
        q, k_window, v_window, mask=Mask(window=blocks.window), scale=scale
    )[0]
    branches = torch.stack((compressed, selected, window), dim=-2)  # [B T H 3 Dv]
    return torch.einsum("bthc,bthcd->bthd", gates, branches), indices
