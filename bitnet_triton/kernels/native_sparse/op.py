"""The public functions of Native Sparse Attention (arXiv:2502.11089)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.kernels.common.checks import (
    check_device,
    check_dtype,
    check_shape,
    check_tensor,
)
from bitnet_triton.kernels.common.lengths import in_a_row
from bitnet_triton.kernels.flash_attention import Mask, flash_attention
from bitnet_triton.kernels.native_sparse.arguments import SparseCall, block_tokens
from bitnet_triton.kernels.native_sparse.attend import compressed_attention, gated_sum
from bitnet_triton.kernels.native_sparse.blocks import SparseBlocks
from bitnet_triton.kernels.native_sparse.compress import block_count, gather_tokens, pool
from bitnet_triton.kernels.quantize.op import FLOATS
from bitnet_triton.kernels.selected_blocks import selected_block_attention


def compress_blocks(
    x: Tensor,
    *,
    block: int,
    stride: int,
    weights: Tensor | None = None,
    linear: Tensor | None = None,
    mlp: tuple[Tensor, Tensor] | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    leftpad: Tensor | None = None,
) -> Tensor:
    """Compress overlapping blocks of tokens into one vector each (arXiv:2502.11089, eq. 7).

    Block i holds the tokens i * stride .. i * stride + block; there are floor((T - block) / stride)
    + 1, none if T < block. What a block becomes is the mean of its tokens, or one of ``weights``,
    ``linear`` and ``mlp``. Mean and weights are kernels, in whose gradient a token reads from the
    blocks that hold it, without atomics; the others are one matrix product for each of block /
    stride parts, over the tokens as they lie (packed or padded ones are copied part by part, and
    the gradient of that copy adds up by PyTorch's rules of determinism).

    Args:
        x: [B T Hk D] float16, bfloat16 or float32; [sum T, Hk, D] for packed sequences. Keys come
            before their rotary embedding and are rotated afterwards.
        block: tokens of a block.
        stride: from one block to the next; divides ``block``.
        weights: [Hk block], sums tokens by their places.
        linear: [Hk block D D'], maps all tokens of a block at once.
        mlp: [Hk block D E] and [Hk E D'], with a GELU between them.
        positions: [Hk block D], added to the tokens by their places in a block.
        cu_seqlens: int32 [B + 1], where packed sequences start: no block crosses their borders.
        leftpad: int32 [B], the first token of each row that is no padding, where blocks start to
            count.

    Returns:
        [B N Hk D'] in the dtype of ``x``; differentiable in all tensors. Packed sequences give
        [sum T // stride, Hk, D'], the blocks of each sequence behind those of the one before; what
        is behind the last one, or with ``leftpad`` behind the last one of a row, is zeros (with
        ``mlp`` or ``positions`` it is whatever zeros become).

    Raises:
        TypeError: a tensor has a wrong dtype.
        ValueError: shapes do not fit, ``stride`` does not divide ``block``, or two of ``weights``,
            ``linear`` and ``mlp`` are given, or both of ``cu_seqlens`` and ``leftpad``.
        BackendUnavailableError: the forced backend cannot run.
    """
    _check_sizes(block, stride)
    _check_tokens(x, cu_seqlens, leftpad)
    cu_seqlens, leftpad = in_a_row(cu_seqlens), in_a_row(leftpad)
    given = [
        name
        for name, t in (("weights", weights), ("linear", linear), ("mlp", mlp))
        if t is not None
    ]
    if len(given) > 1:
        raise ValueError(f"`{given[1]}`: expected none beside `{given[0]}`")
    Hk, D = x.shape[-2:]
    sizes = {"Hk": Hk, "block": block, "D": D}
    for name, t, dims in (
        ("weights", weights, "Hk block"),
        ("linear", linear, "Hk block D E"),
        ("mlp[0]", None if mlp is None else mlp[0], "Hk block D E"),
        ("positions", positions, "Hk block D"),
    ):
        if t is not None:
            _check_parameter(name, t, x, dims, **sizes)
    if mlp is not None:
        _check_parameter("mlp[1]", mlp[1], x, "Hk E F", Hk=Hk, E=mlp[0].shape[-1])
    product = linear if mlp is None else mlp[0]
    if product is None:
        y = pool(x, weights, cu_seqlens, leftpad, block, stride)
        if positions is not None:
            y = y + _pooled(positions, weights)
        return y
    y = _product(x, product, cu_seqlens, leftpad, block, stride)
    if positions is not None:
        y = y + torch.einsum("hrd,hrde->he", positions, product)
    if mlp is not None:
        y = torch.einsum("...he,hed->...hd", F.gelu(y), mlp[1])
    return y


def _pooled(positions: Tensor, weights: Tensor | None) -> Tensor:
    """Return what pooling makes of the embedding of places, the same for every block, [Hk D]."""
    if weights is None:
        return positions.mean(1)
    return torch.einsum("hrd,hr->hd", positions, weights)


def _product(
    x: Tensor, w: Tensor, cu_seqlens: Tensor | None, leftpad: Tensor | None, block: int, stride: int
) -> Tensor:
    """Map the tokens of each block by w [Hk block D E], one stride at a time."""
    count = block_count(x, block, stride, cu_seqlens)
    lengths = {"cu_seqlens": cu_seqlens, "leftpad": leftpad}
    first = block_tokens(x.shape[-3], block=block, stride=stride, **lengths)
    y = x.new_zeros(*x.shape[:-3], count, x.shape[-2], w.shape[-1])
    for start in range(0, block, stride):
        if first is None:
            part = x[:, start : start + count * stride].unflatten(1, (count, stride))
        else:
            part = gather_tokens(x, first, start, start + stride)
        y = y + torch.einsum("...rhd,hrde->...he", part, w[:, start : start + stride])
    return y


def select_blocks(
    q: Tensor,
    k_compressed: Tensor,
    *,
    blocks: SparseBlocks,
    tokens: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    leftpad: Tensor | None = None,
) -> Tensor:
    """Choose for each token and key head the blocks that it reads (arXiv:2502.11089, eq. 9 to 11).

    A block is as important as the attention that compressed keys get, as far as they share tokens
    with it: each compressed weight counts as often as there are strides in both, summed over the
    query heads of a key head. The first and the latest blocks are taken in any case. There is no
    gradient. No more of the scores exists at a time than programs run.

    Args:
        q: [B Tq H D] float16, bfloat16 or float32; [sum T, H, D] for packed sequences.
        k_compressed: [B N Hk D], as ``compress_blocks`` makes them.
        blocks: sizes and numbers.
        tokens: of each row, of which the queries are the last. Default: there are no others.
        scale: multiplies the scores. Default: ``D ** -0.5``.
        cu_seqlens: int32 [B + 1], where packed sequences start.
        leftpad: int32 [B], the first token of each row that is no padding.

    Returns:
        int32 [B Tq Hk selected] ([sum T, Hk, selected]): the forced blocks, then others by falling
        score, of equal ones the earlier; -1 where there are no more, and for padding.

    Raises:
        TypeError: a tensor has a wrong dtype, or ``blocks`` is no SparseBlocks.
        ValueError: shapes do not fit.
        BackendUnavailableError: the forced backend cannot run.
    """
    _check_blocks(blocks)
    _check_tokens(q, cu_seqlens, leftpad, name="q")
    cu_seqlens, leftpad = in_a_row(cu_seqlens), in_a_row(leftpad)
    tokens = q.shape[-3] if tokens is None else tokens
    if tokens < q.shape[-3]:
        raise ValueError(f"`tokens`: expected at least {q.shape[-3]}, those of `q`, got {tokens}")
    _check_compressed("k_compressed", k_compressed, q, q.shape[-1], tokens, blocks, cu_seqlens)
    call = SparseCall(
        blocks, _scale(q, scale), tokens, attend=False, select=True, keeps_lse=False,
        cu_seqlens=cu_seqlens, leftpad=leftpad,
    )  # fmt: skip
    q, k = q.detach(), k_compressed.detach()
    v = k.view_as(k) if torch.compiler.is_compiling() else k
    return compressed_attention(q, k, v, call)[2]


def native_sparse_attention(  # noqa: PLR0913 - tensors of three branches
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
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    leftpad: Tensor | None = None,
    indices: Tensor | None = None,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to compressed blocks, to chosen blocks and to a window, and sum what they give.

    ``sum_c g_c softmax(scale q K_c^T) V_c`` (arXiv:2502.11089, eq. 5): a compressed key is seen
    from the last token of its block on, a chosen block up to the query itself. A branch in which a
    query sees nothing gives zeros. Results and gradients are deterministic; which blocks are chosen
    has no gradient. The last query stands at the last key.

    Args:
        q: [B Tq H D] float16, bfloat16 or float32; [sum T, H, D] for packed sequences.
        k: [B Tk Hk D] in the dtype of ``q``, Hk divides H; of the chosen blocks.
        v: [B Tk Hk Dv].
        k_compressed: [B N Hk D], with at least floor((Tk - block) / stride) + 1 keys, as
            ``compress_blocks`` makes them.
        v_compressed: [B N Hk Dv].
        gates: [B Tq H 3] in the dtype of ``q``, of the compressed blocks, the chosen ones and the
            window, as they multiply: sigmoids have been taken.
        blocks: sizes and numbers of blocks.
        k_window: [B Tk Hk D], keys of the window. Default: ``k``.
        v_window: [B Tk Hk Dv]. Default: ``v``.
        scale: multiplies the scores. Default: ``D ** -0.5``.
        cu_seqlens: int32 [B + 1], where packed sequences start.
        leftpad: int32 [B], the first token of each row that is no padding, where blocks start to
            count. Queries before it give zeros.
        indices: int32 [B Tq Hk S], blocks to read instead of those that scores choose; -1: none.
        return_indices: return the blocks that were read as well.

    Returns:
        [B Tq H Dv] in the dtype of ``q``; with ``return_indices`` also int32 [B Tq Hk S].
        Differentiable in all tensors but ``indices``.

    Raises:
        TypeError: a tensor has a wrong dtype, or ``blocks`` is no SparseBlocks.
        ValueError: shapes do not fit, one of ``k_window`` and ``v_window`` is missing, or
            ``cu_seqlens`` meets ``leftpad``.
        BackendUnavailableError: the forced backend cannot run.
    """
    _check_blocks(blocks)
    _check_tokens(q, cu_seqlens, leftpad, name="q")
    cu_seqlens, leftpad = in_a_row(cu_seqlens), in_a_row(leftpad)
    _check_keys(q, k, v, cu_seqlens)
    if (k_window is None) != (v_window is None):
        raise ValueError("`k_window`, `v_window`: expected both or neither")
    k_window, v_window = (k, v) if k_window is None or v_window is None else (k_window, v_window)
    for name, t, like in (("k_window", k_window, k), ("v_window", v_window, v)):
        _check_like(name, t, like)
    tokens = k.shape[-3]
    _check_compressed("k_compressed", k_compressed, q, q.shape[-1], tokens, blocks, cu_seqlens)
    _check_compressed("v_compressed", v_compressed, q, v.shape[-1], tokens, blocks, cu_seqlens)
    if k_compressed.shape[:-1] != v_compressed.shape[:-1] or k_compressed.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"`k_compressed`, `v_compressed`: expected equal numbers of keys and the "
            f"{k.shape[-2]} heads of `k`, got {list(k_compressed.shape)} and "
            f"{list(v_compressed.shape)}"
        )
    _check_gates(gates, q)
    scale = _scale(q, scale)
    call = SparseCall(
        blocks, scale, tokens, select=indices is None, cu_seqlens=cu_seqlens, leftpad=leftpad
    )
    compressed, _, chosen = compressed_attention(q, k_compressed, v_compressed, call)
    if indices is None:
        indices = chosen
    lengths: Any = {"cu_seqlens": cu_seqlens, "leftpad": leftpad}
    selected: Any = selected_block_attention(
        q, k, v, indices, block=blocks.selection, scale=scale, **lengths
    )
    window: Any = flash_attention(
        q, k_window, v_window, mask=Mask(window=blocks.window), scale=scale, leftpad_k=leftpad,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
    )  # fmt: skip
    out = gated_sum(compressed, selected, window, gates)
    return (out, indices) if return_indices else out


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _check_sizes(block: int, stride: int) -> None:
    for name, value in (("block", block), ("stride", stride)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{name}`: expected an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"`{name}`: expected at least 1, got {value}")
    if block % stride:
        raise ValueError(f"`block`: expected a multiple of `stride`, {stride}, got {block}")


def _check_blocks(blocks: object) -> None:
    if not isinstance(blocks, SparseBlocks):
        raise TypeError(f"`blocks`: expected SparseBlocks, got {type(blocks).__name__}")


def _check_tokens(
    x: Tensor, cu_seqlens: Tensor | None, leftpad: Tensor | None, name: str = "x"
) -> None:
    check_tensor(name, x)
    check_dtype(name, x, *FLOATS)
    check_shape(name, x, "B T H D" if cu_seqlens is None else "T H D")
    if cu_seqlens is not None and leftpad is not None:
        raise ValueError("`leftpad`: packed sequences have no padding to the left")
    for label, lengths in (("cu_seqlens", cu_seqlens), ("leftpad", leftpad)):
        if lengths is not None:
            check_tensor(label, lengths)
            check_dtype(label, lengths, torch.int32)
            check_shape(label, lengths, "B", **({} if leftpad is None else {"B": x.shape[0]}))
            check_device(label, lengths, x.device)
    if cu_seqlens is not None and cu_seqlens.numel() == 0:
        raise ValueError("`cu_seqlens`: expected [B+1] with B at least 0, got [0]")


def _check_parameter(name: str, t: Tensor, x: Tensor, dims: str, **sizes: int) -> None:
    check_tensor(name, t)
    check_dtype(name, t, x.dtype)
    check_device(name, t, x.device)
    check_shape(name, t, dims, **{dim: sizes[dim] for dim in dims.split() if dim in sizes})


def _check_keys(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    rows = "B Tk" if cu_seqlens is None else "T"
    known = {"B": q.shape[0]} if cu_seqlens is None else {"T": q.shape[0]}
    for name, t in (("k", k), ("v", v)):
        check_tensor(name, t)
        check_dtype(name, t, q.dtype)
        check_device(name, t, q.device)
    check_shape("k", k, f"{rows} Hk D", **known, D=q.shape[-1])
    sizes = known | ({"Tk": k.shape[1]} if cu_seqlens is None else {})
    check_shape("v", v, f"{rows} Hk Dv", **sizes, Hk=k.shape[-2])
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"`k`: expected heads that divide the {q.shape[-2]} of `q`, got {k.shape[-2]}"
        )
    if k.shape[-3] < q.shape[-3]:
        raise ValueError(
            f"`k`: expected at least the {q.shape[-3]} tokens of `q`, got {k.shape[-3]}"
        )


def _check_like(name: str, t: Tensor, like: Tensor) -> None:
    check_tensor(name, t)
    check_dtype(name, t, like.dtype)
    check_device(name, t, like.device)
    if t.shape != like.shape:
        raise ValueError(f"`{name}`: expected {list(like.shape)}, got {list(t.shape)}")


def _check_compressed(
    name: str, t: Tensor, q: Tensor, D: int, tokens: int, blocks: SparseBlocks,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    check_tensor(name, t)
    check_dtype(name, t, q.dtype)
    check_device(name, t, q.device)
    dims = "B N Hk D" if cu_seqlens is None else "N Hk D"
    check_shape(name, t, dims, D=D, **({"B": q.shape[0]} if cu_seqlens is None else {}))
    if t.shape[-2] == 0 or q.shape[-2] % t.shape[-2]:
        raise ValueError(
            f"`{name}`: expected heads that divide the {q.shape[-2]} of `q`, got {t.shape[-2]}"
        )
    # all packed sequences together have no more than tokens // stride
    if cu_seqlens is None and t.shape[1] < blocks.compressed(tokens):
        raise ValueError(
            f"`{name}`: expected at least {blocks.compressed(tokens)} blocks for {tokens} tokens, "
            f"got {t.shape[1]}"
        )


def _check_gates(gates: Tensor, q: Tensor) -> None:
    check_tensor("gates", gates)
    check_dtype("gates", gates, q.dtype)
    check_device("gates", gates, q.device)
    if gates.shape != (*q.shape[:-1], 3):
        raise ValueError(f"`gates`: expected {[*q.shape[:-1], 3]}, got {list(gates.shape)}")
