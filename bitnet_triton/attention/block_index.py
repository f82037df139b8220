"""The index of ``indexed_blocks``: small queries and one key, by which blocks are found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitnet_triton.kernels import apply_rotary


class BlockIndex(nn.Module):
    """Index queries, one head for each head of keys, and one index key for all of them.

    Both are projections of what enters the attention layer, normed and rotated like its own queries
    and keys (arXiv:2606.13392). Gradients end at the input: the model never feels the index.

    Args:
        hidden_size: of the layer's input.
        heads: heads of keys.
        head_dim: of queries and keys, and of the index: one rotary embedding serves all.
        eps: of the norms.

    Attributes:
        loss: of the last forward pass in training, to be added to that of the model; None: it had
            none.
    """

    def __init__(self, hidden_size: int, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(hidden_size, heads * head_dim, bias=False)
        self.key = nn.Linear(hidden_size, head_dim, bias=False)
        self.query_norm = nn.RMSNorm(head_dim, eps)
        self.key_norm = nn.RMSNorm(head_dim, eps)
        self.loss: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"loss": None}  # its graph can be neither copied nor saved

    def is_plain(self) -> bool:
        """Tell whether its weights say all that its parts do: no adapters, no hooks."""
        parts: list[tuple[Any, type[nn.Module]]] = [
            (self.query, nn.Linear), (self.key, nn.Linear),
            (self.query_norm, nn.RMSNorm), (self.key_norm, nn.RMSNorm),
        ]  # fmt: skip
        return all(
            type(part) is kind
            and "forward" not in vars(part)
            and not (part._forward_hooks or part._forward_pre_hooks)
            and getattr(part, "bias", None) is None
            for part, kind in parts
        )

    def queries(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Map hidden states [B T K] to index queries [B T Hk D]."""
        return self._rotated(self.query(hidden.detach()), self.query_norm, rotary)

    def keys(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Map hidden states [B T K] to index keys [B T 1 D]."""
        return self._rotated(self.key(hidden.detach()), self.key_norm, rotary)

    def _rotated(self, x: Tensor, norm: nn.Module, rotary: tuple[Tensor, Tensor]) -> Tensor:
        heads = norm(x.unflatten(-1, (-1, self.head_dim)))
        cos, sin = (angle.detach().to(heads.dtype) for angle in rotary)
        return apply_rotary(heads, cos, sin)

    @torch.no_grad()
    def init_from(self, attention: Any) -> None:
        """Start near the scores of an attention layer that has weights.

        The sum over a group of its queries times its key is, for each rotary frequency c, a
        product of two complex forms of the input, u_jc and v_jc for head j of keys. One index key
        w_c for all j comes closest in the least squares where it is the first principal direction
        of |u_jc| v_jc; its queries are then conj(<w_c, v_jc>) u_jc.
        """
        q_weight, k_weight = (weight_of(attention.q_proj), weight_of(attention.k_proj))
        if q_weight.is_meta:
            return  # weights are yet to be loaded, those of the index with them
        u, v = (_complex_forms(w, self.head_dim) for w in (q_weight, k_weight))
        Hk = v.shape[0]
        u = u.unflatten(0, (Hk, -1)).sum(1)  # [Hk D/2 K]
        weighted = torch.einsum("jck,jc->cjk", v, u.norm(dim=-1).to(v.dtype))
        gram = torch.einsum("cjk,cik->cji", weighted, weighted.conj())
        first = torch.linalg.eigh(gram).eigenvectors[..., -1]  # [D/2 Hk]
        w = torch.einsum("cj,cjk->ck", first.conj(), weighted)
        length = w.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        w = w / length
        shares = torch.einsum("ck,jck->jc", w.conj(), v)
        queries = shares.conj()[..., None] * u
        # the norms take the size of a whole row away, but not how it is divided among frequencies
        balance = (queries.norm(dim=-1).mean(0) ** 0.5).clamp_min(1e-12)
        self.query.weight.copy_(_real_rows(queries / balance[:, None]))
        self.key.weight.copy_(_real_rows((w * balance[:, None])[None]))


def weight_of(linear: Any) -> Tensor:
    """Return the weight of a linear [N K] in float32; of a packed one by what it does to units."""
    weight = linear.weight
    if weight.is_floating_point():
        return weight.detach().float()
    unit = torch.eye(linear.in_features, device=weight.device)
    zero = linear(unit[:1] * 0)
    return (linear(unit) - zero).T.float()


def _complex_forms(weight: Tensor, head_dim: int) -> Tensor:
    """Return the rows [H D, K] that a rotary embedding turns together, as complex [H D/2 K]."""
    first, second = weight.unflatten(0, (-1, head_dim)).chunk(2, dim=1)
    return torch.complex(first, second)


def _real_rows(forms: Tensor) -> Tensor:
    """Return complex forms [H D/2 K] as the rows of a weight [H D, K]."""
    return torch.cat([forms.real, forms.imag], dim=1).flatten(0, 1)
