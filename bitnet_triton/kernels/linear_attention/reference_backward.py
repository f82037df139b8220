"""The gradients of linear attention by formula, chunk by chunk (docs/linear-attention.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.linear_attention.reference import parallel_reference

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def chunked_backward_reference(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float,
    initial_state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return the gradients of q, k, v, log_decay, beta and the initial state."""
    S = initial_state
    if S is None:
        S = k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1])
    dS = torch.zeros_like(S) if dstate is None else dstate
    given = (q, k, v, log_decay, beta)
    parts: list[Any] = []
    for start in range(0, q.shape[1], chunk):
        own: Any = [None if t is None else t[:, start : start + chunk] for t in given]
        parts.append((dout[:, start : start + chunk], S, *own))
        S = parallel_reference(
            *own[:3], log_decay=own[3], beta=own[4], scale=scale, initial_state=S
        )[1]
    found: list[Any] = []
    for part in reversed(parts):
        grads, dS = parallel_backward_reference(part[0], dS, *part[1:], scale=scale)
        found.append(grads)
    if not found:
        found.append([t if t is None else torch.zeros_like(t) for t in given])
    joined: Any = [None if own[0] is None else torch.cat(own[::-1], 1) for own in zip(*found)]
    return (*joined, dS)


def parallel_backward_reference(
    dout: Tensor, dS: Tensor, S: Tensor, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, beta: Tensor | None, *, scale: float,
) -> tuple[Gradients, Tensor]:  # fmt: skip
    """Return the gradients of the tokens of a chunk, and that of the state S [B Hk D Dv] before it.

    With the letters of ``parallel_reference``, M = scale tril(q k^T * D), N = tril(k k^T * D, -1),
    x the gradient of u, and dS that of the state behind it::

        x = M^T dout + (exp(g_T - g) k) dS
        (I + diag(beta) N)^T w = x
        dv = beta w        dbeta = w . (v - exp(g) k S - N u)
    """
    (B, T, H, D), Hk = q.shape, k.shape[2]
    q, dout = (t.transpose(1, 2).unflatten(1, (Hk, H // Hk)) for t in (scale * q, dout))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    g = k.new_zeros(B, Hk, T, 1)
    if log_decay is not None:
        g = log_decay.view(B, T, Hk, -1).transpose(1, 2).cumsum(2)
    is_seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[..., None]
    decay = (g[:, :, :, None] - g[:, :, None]).masked_fill(~is_seen, float("-inf")).exp()
    decay = decay.expand(*decay.shape[:-1], D)
    since, rest, whole = g.exp(), (g[:, :, -1:] - g).exp(), g[:, :, -1, :, None].exp()

    b = torch.ones_like(k[..., :1]) if beta is None else beta.transpose(1, 2)[..., None]
    N = torch.einsum("bhid,bhjd,bhijd->bhij", k, k, decay).tril(-1)
    if beta is None:
        N = torch.zeros_like(N)
    read = v if beta is None else v - (since * k) @ S
    eye = torch.eye(T, dtype=q.dtype, device=q.device)
    u = torch.linalg.solve_triangular(eye + b * N, b * read, upper=False)

    M = torch.einsum("bhgid,bhjd,bhijd->bhgij", q, k, decay)
    x = torch.einsum("bhgij,bhgiv->bhjv", M, dout) + (rest * k) @ dS
    w = torch.linalg.solve_triangular((eye + b * N).mT, x, upper=True)
    dM = torch.einsum("bhgiv,bhjv->bhgij", dout, u).tril()
    dN = -(b * w) @ u.mT if beta is not None else torch.zeros_like(N)

    reads = torch.einsum("bhgiv,bhdv->bhgid", dout, S) * since[:, :, None]
    dq = reads + torch.einsum("bhgij,bhjd,bhijd->bhgid", dM, k, decay)
    # of keys as those that read, and as those that are read
    own = torch.einsum("bhij,bhjd,bhijd->bhid", dN.tril(-1), k, decay)
    if beta is not None:
        own = own - since * ((b * w) @ S.mT)
    late = rest * (u @ dS.mT)
    dk = torch.einsum("bhgij,bhgid,bhijd->bhjd", dM, q, decay)
    dk = dk + torch.einsum("bhij,bhid,bhijd->bhjd", dN.tril(-1), k, decay) + late
    grads_log_decay = None
    if log_decay is not None:
        dg = (q * dq).sum(2) + k * own - k * dk
        dg[:, :, -1] += (k * late).sum(2) + (whole * S * dS).sum(-1)
        dg = dg.flip(2).cumsum(2).flip(2).transpose(1, 2)
        grads_log_decay = dg.sum(-1) if log_decay.ndim == 3 else dg
    dbeta = None if beta is None else (w * (read - N @ u)).sum(-1).transpose(1, 2)
    before = whole * dS + torch.einsum("bhgid,bhgiv->bhdv", since[:, :, None] * q, dout)
    if beta is not None:
        before = before - (since * k).mT @ (b * w)
    dq = scale * dq.flatten(1, 2).transpose(1, 2)
    dv = (b * w).transpose(1, 2)
    return (dq, (dk + own).transpose(1, 2), dv, grads_log_decay, dbeta), before
