"""What a student learns of a teacher beside the next token: its logits, and how its tokens relate.

Relations are those of MiniLMv2 (arXiv:2012.15828, section 3), as BitDistill takes them
(arXiv:2510.13998): of the queries, keys and values of one layer, each among themselves,

    R = softmax(A A^T / sqrt(D)),   loss = mean over heads and tokens of KL(R_teacher || R_student)

Only heads have to be as many as the teacher's; they may be wider or narrower.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Numbers of a matrix that is there at a time: one [T T] of a head, or those of several short texts
_AT_ONCE = 1 << 22

# Row of the batch, first token, end
Span = tuple[int, int, int]


def relation_loss(student: Tensor, teacher: Tensor, documents: Sequence[Span]) -> Tensor:
    """Tell how far the relations among a student's vectors are from those among a teacher's.

    ``mean of KL(softmax(A A^T / sqrt(D)) of the teacher || that of the student)`` over heads and
    tokens, each document by itself. Matrices [T T] are made for some heads of a document at a
    time, and made again in the backward.

    Args:
        student: [B T H D], queries, keys or values.
        teacher: [B T H D'], of the same tokens; no gradient goes there.
        documents: row, first token and end of each, as ``find_documents`` gives them; tokens
            outside, padding, are neither compared nor related to.

    Returns:
        A scalar, in float32 or the dtype of a wider ``student``.

    Raises:
        ValueError: heads or tokens differ, or there is no document.
    """
    if student.shape[:3] != teacher.shape[:3]:
        raise ValueError(
            f"`teacher`: expected [B T H D] with B T H {list(student.shape[:3])}, got "
            f"{list(teacher.shape)}"
        )
    H, tokens = student.shape[2], sum(end - start for _, start, end in documents)
    if not tokens:
        raise ValueError("`documents`: expected some tokens, got none")
    total = student.new_zeros((), dtype=_wide(student.dtype))
    for row, start, end in documents:
        heads = max(1, _AT_ONCE // (end - start) ** 2)
        for first in range(0, H, heads):
            part = (row, slice(start, end), slice(first, first + heads))
            total = total + checkpoint(
                _relation_divergence, student[part], teacher[part].detach(),
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
    return total / (H * tokens)


def logits_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Tell how far a student's next tokens are from a teacher's.

    ``tau**2 * mean of KL(softmax(teacher / tau) || softmax(student / tau))`` over tokens
    (arXiv:1503.02531, section 2: by the square, gradients keep their size at other temperatures).

    Args:
        student: logits [N V]. What is made of them is made for some tokens at a time.
        teacher: logits [N V]; no gradient goes there.
        temperature: tau; above 1, what is unlikely counts more.

    Returns:
        A scalar, in float32 or the dtype of a wider ``student``; 0 without a token.

    Raises:
        ValueError: shapes differ, or ``temperature`` is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"`teacher`: expected logits {list(student.shape)}, got {list(teacher.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"`temperature`: expected a positive number, got {temperature}")
    N, V = student.shape
    total = student.new_zeros((), dtype=_wide(student.dtype))
    for some, wanted in zip(*(x.split(max(1, _AT_ONCE // V)) for x in (student, teacher))):
        total = total + checkpoint(
            _divergence, some, wanted.detach(), 1 / temperature,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return temperature**2 * total / max(N, 1)


def _relation_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum over tokens and heads for [T H D] and [T H D']."""
    with torch.autocast(student.device.type, enabled=False):
        products = []
        for vectors in (student, teacher):
            vectors = vectors.to(_wide(vectors.dtype)).transpose(0, 1)  # [H T D]
            products.append(vectors @ vectors.mT * vectors.shape[-1] ** -0.5)
        return _divergence(products[0], products[1], 1.0)


def _divergence(student: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """Return KL of softmax(scale * x) over the last dimension, summed over all others."""
    ours = (student.to(_wide(student.dtype)) * scale).log_softmax(-1)
    theirs = (teacher.to(ours.dtype) * scale).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def find_documents(batch: Mapping[str, Any]) -> list[Span]:
    """Return row, first token and end of each document of a batch, padding left out.

    Args:
        batch: ``input_ids`` [B T], with ``cu_seq_lens_q`` as a packed row has it, or
            ``attention_mask`` [B T] and ``position_ids`` [B T] or [1 T], whose restarts begin
            documents; both may be missing.

    Raises:
        ValueError: padding stands inside a text.
    """
    B, T = batch["input_ids"].shape
    bounds = batch.get("cu_seq_lens_q")
    if bounds is not None:
        return [(0, start, end) for start, end in itertools.pairwise(bounds.tolist())]
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    found: list[Span] = []
    for row in range(B):
        start, end = (0, T) if mask is None else _text_of(mask[row])
        cuts = []
        if positions is not None and end > start:
            counted = positions[min(row, len(positions) - 1), start:end]
            cuts = (counted.diff() != 1).nonzero().flatten().add(start + 1).tolist()
        edges = [start, *cuts, end]
        found += [(row, *edge) for edge in itertools.pairwise(edges) if edge[1] > edge[0]]
    return found


def _text_of(mask: Tensor) -> tuple[int, int]:
    places = mask.nonzero().flatten().tolist()
    start, end = (places[0], places[-1] + 1) if places else (0, 0)
    if end - start != len(places):
        raise ValueError("`attention_mask`: expected padding around a text, got zeros inside of it")
    return start, end


@contextmanager
def projections(decoder: Any, layer: int) -> Iterator[dict[str, Tensor]]:
    """Collect queries, keys and values of a layer, each [B T H D], before they are rotated.

    Args:
        decoder: a decoder of transformers with ``layers``, each with a ``self_attn``.
        layer: its number; negative ones count from the end.
    """
    attention = decoder.layers[layer].self_attn
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output.unflatten(-1, (-1, attention.head_dim))

        return hook

    names = ("q_proj", "k_proj", "v_proj")
    hooks = [getattr(attention, name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
