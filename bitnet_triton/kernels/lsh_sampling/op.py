"""The public attention by importance sampling, for one query of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_device, check_dtype, check_shape, check_tensor
from bitnet_triton.kernels.common.lengths import in_a_row
from bitnet_triton.kernels.lsh_sampling.launchers import SAMPLING, Sampling
from bitnet_triton.kernels.lsh_sampling.tables import HashTables, check_query
from bitnet_triton.runtime import register_op, select


def _launch(q: Tensor, k: Tensor, v: Tensor, call: Sampling) -> tuple[Tensor, Tensor]:
    return select("lsh_sampling", SAMPLING, q.device)(q, k, v, call)


def _fake(q: Tensor, k: Tensor, v: Tensor, call: Sampling) -> tuple[Tensor, Tensor]:
    B, _, H, _ = q.shape
    return q.new_empty((B, 1, H, v.shape[-1])), q.new_empty((B, H, 1), dtype=torch.float32)


_attend = register_op("lsh_sampling", _launch, _fake, bundle=Sampling)


def lsh_sampling_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: HashTables,
    *,
    sinks: int = 4,
    recent: int = 64,
    share: str = "own",
    scale: float | None = None,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to a few keys exactly, and to a sample that stands for all the others.

    Rows that collide with the query in two tables or more are read, each weighed by one over the
    probability ``u`` of that (arXiv:2410.16179): ``o = (sum_S e^{s q k - ln u} v + sum_exact e^{s q
    k} v) / (the same without v)``. Numerator and denominator are right in the mean over planes. For
    decoding; not differentiable.

    Args:
        q: [B 1 H D] float16, bfloat16 or float32, rotated.
        k: [B T Hk D] in the dtype of ``q``; the rows that ``tables`` was made from, and maybe
            further ones, which are read in any case.
        v: [B T Hk Dv].
        tables: of ``k``, with its padding.
        sinks: first rows that are read in any case.
        recent: latest rows that are read in any case.
        share: which rows the heads of a group read. "own": each its own sample. "union": those of
            all of them, each head having a part of the tables to itself, L / G of them. "proposal":
            one sample, drawn with the mean direction of their queries. Each is unbiased.
        scale: multiplies the scores. Default: ``D ** -0.5``.
        used: int32 [B], one past the last row that a query sees. Default: all.

    Returns:
        out [B 1 H Dv] in the dtype of ``q`` and lse float32 [B H 1], an estimate of that of all
        rows; 0 and -inf where nothing was read.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes do not fit, a number is out of range, ``k`` has fewer rows than
            ``tables``, or something requires a gradient.
        BackendUnavailableError: the forced backend cannot run.
    """
    check_tables_call(q, k, v, tables, share)
    for name, value in (("sinks", sinks), ("recent", recent)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{name}`: expected an integer, got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"`{name}`: expected at least 0, got {value}")
    if used is not None:
        check_tensor("used", used)
        check_dtype("used", used, torch.int32)
        check_shape("used", used, "B", B=q.shape[0])
        check_device("used", used, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # what has no code yet is read as well
    recent = max(recent, k.shape[1] - tables.length)
    call = tables.call(share, sinks=sinks, recent=recent, scale=scale, used=in_a_row(used))
    return _attend(q, k, v, call)


def check_tables_call(q: Tensor, k: Tensor, v: Tensor, tables: HashTables, share: str) -> None:
    """Raise what is wrong with the tensors of a call."""
    if not isinstance(tables, HashTables):
        raise TypeError(f"`tables`: expected HashTables, got {type(tables).__name__}")
    check_query(q, tables, share)
    B, _, Hk, D = tables.keys.shape
    for name, value, dims, sizes in (
        ("k", k, "B T Hk D", {"B": B, "Hk": Hk, "D": D}),
        ("v", v, "B T Hk Dv", {"B": B, "Hk": Hk, "T": k.shape[1] if k.ndim == 4 else -1}),
    ):
        check_tensor(name, value)
        check_dtype(name, value, q.dtype)
        check_shape(name, value, dims, **sizes)
        check_device(name, value, q.device)
    if k.shape[1] < tables.length:
        raise ValueError(
            f"`k`: expected at least the {tables.length} rows of `tables`, got {k.shape[1]}"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("`q`, `k`, `v`: expected tensors without gradient: sampling has none")
