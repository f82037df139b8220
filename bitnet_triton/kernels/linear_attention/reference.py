"""Linear attention in plain PyTorch, in three forms of the same function.

The recurrence is that of the gated delta rule (arXiv:2412.06464, eq. 10), with a decay of each
channel that of KDA (arXiv:2510.26692, eq. 1), without ``beta`` that of arXiv:2006.16236, eq. 16 to
20, and with decay of arXiv:2312.06635. docs/linear-attention.md derives the others from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-10
# exp of it is 0 in float32, and of sums of it nothing is lost that counts
LEAST_LOG_DECAY = -120.0


def recurrent_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalize: bool = False,
    scale: float,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Go through the tokens one by one; return out [B T H Dv] and the last state [B Hk D Dv].

    With ``normalize`` the state has one more column [B Hk D Dv+1], the sum of keys.
    """
    groups = q.shape[2] // k.shape[2]
    S = _start(k, v, initial_state, normalize)
    if normalize:
        S, z = S[..., :-1], S[..., -1]
    out = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = q[:, t], k[:, t], v[:, t]
        if log_decay is not None:
            a = log_decay[:, t].exp().view(*k_t.shape[:2], -1)  # [B Hk 1] or [B Hk D]
            S = a[..., None] * S
            if normalize:
                z = a * z
        write = v_t
        if beta is not None:
            write = beta[:, t, :, None] * (v_t - torch.einsum("bhdv,bhd->bhv", S, k_t))
        S = S + torch.einsum("bhd,bhv->bhdv", k_t, write)
        o = torch.einsum("bhdv,bhd->bhv", S.repeat_interleave(groups, 1), scale * q_t)
        if normalize:
            z = z + k_t
            n = torch.einsum("bhd,bhd->bh", z.repeat_interleave(groups, 1), scale * q_t)
            o = normalised(o, n[..., None])
        out.append(o)
    if normalize:
        S = torch.cat((S, z[..., None]), -1)
    return torch.stack(out, 1) if out else q.new_zeros(*q.shape[:3], v.shape[-1]), S


def parallel_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take all tokens at once, as a product of [T T] matrices; returns what the recurrence does.

    With g the sums of ``log_decay`` and D_ab = exp(g_a - g_b) for b <= a::

        (I + diag(beta) tril(k k^T * D, -1)) u = diag(beta) (v - exp(g) k S_0)
        out = scale (exp(g) q S_0 + tril(q k^T * D) u)
        S_T = exp(g_T) S_0 + (exp(g_T - g) k)^T u
    """
    (B, T, H, _), Hk = q.shape, k.shape[2]
    S = _start(k, v, initial_state, False)
    q, k, v = scale * q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    g = k.new_zeros(B, Hk, T, 1)
    if log_decay is not None:
        g = log_decay.view(B, T, Hk, -1).transpose(1, 2).cumsum(2)
    # masked before exp: what lies above the diagonal would overflow
    is_seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[..., None]
    decay = (g[:, :, :, None] - g[:, :, None]).masked_fill(~is_seen, float("-inf")).exp()
    u = v
    if beta is not None:
        beta = beta.transpose(1, 2)[..., None]
        A = beta * _pairs(k, k, decay).tril(-1)
        rest = beta * (v - (k * g.exp()) @ S)
        u = torch.linalg.solve_triangular(A, rest, upper=False, unitriangular=True)
    heads = [t.repeat_interleave(H // Hk, 1) for t in (k, decay, g, S, u)]
    weights = _pairs(q, *heads[:2])
    out = (q * heads[2].exp()) @ heads[3] + weights @ heads[4]
    last = g[:, :, -1:] if T else g.new_zeros(B, Hk, 1, 1)
    S = last.transpose(-1, -2).exp() * S + (k * (last - g).exp()).transpose(-1, -2) @ u
    return out.transpose(1, 2), S


def _pairs(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """Return the sum over channels of q_a k_b decay_ab [.. T T]; 0 above the diagonal."""
    if decay.shape[-1] == 1:
        return (q @ k.transpose(-1, -2)) * decay[..., 0]
    return torch.einsum("bhid,bhjd,bhijd->bhij", q, k, decay)


def chunked_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float,
    initial_state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Take chunks of tokens one by one, each in parallel; returns what the recurrence does."""
    S = _start(k, v, initial_state, False)
    out = []
    for start in range(0, q.shape[1], chunk):
        q_c, k_c, v_c, g_c, beta_c = (
            None if t is None else t[:, start : start + chunk] for t in (q, k, v, log_decay, beta)
        )
        assert q_c is not None
        assert k_c is not None
        assert v_c is not None
        o, S = parallel_reference(
            q_c, k_c, v_c, log_decay=g_c, beta=beta_c, scale=scale, initial_state=S
        )
        out.append(o)
    return torch.cat(out, 1) if out else q.new_zeros(*q.shape[:3], v.shape[-1]), S


def with_sum_of_keys(v: Tensor) -> Tensor:
    """Return v [.. Dv] with a column of ones: its state then has the sum of keys as a column."""
    return torch.cat((v, torch.ones_like(v[..., :1])), -1)


def normalised(out: Tensor, weight: Tensor) -> Tensor:
    """Return out [.. Dv] divided by the sum of its weights [.. 1]; 0 where there is none."""
    empty = weight == 0
    # the second where keeps the gradient of what is not used finite
    return torch.where(empty, 0.0, out / torch.where(empty, 1.0, weight + EPS))


def _start(k: Tensor, v: Tensor, initial_state: Tensor | None, normalize: bool) -> Tensor:
    if initial_state is not None:
        return initial_state.to(k.dtype)
    return k.new_zeros(k.shape[0], *k.shape[2:], v.shape[-1] + normalize)
