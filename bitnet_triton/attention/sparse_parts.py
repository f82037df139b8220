"""What native_sparse brings to an attention layer: gates, compressors and projections."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_triton.kernels import compress_blocks

COMPRESSIONS = ("mean", "weights", "linear", "mlp")
# where the gates start, before the sigmoid: compressed blocks, chosen blocks, the window
_GATES_START = (-2.0, 0.0, 0.0)


class Gates(nn.Module):
    """Maps hidden states [B T K] to gates [B T H 3] between 0 and 1; stays dense."""

    def __init__(self, K: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3 * heads, K))
        self.bias = nn.Parameter(torch.tensor(_GATES_START).repeat(heads))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B T K] to [B T H 3]."""
        return F.linear(x, self.weight, self.bias).sigmoid().unflatten(-1, (-1, 3))


class Compressor(nn.Module):
    """Maps the tokens of each block to one, for each head of keys or values; stays dense.

    Args:
        kind: one of ``COMPRESSIONS``.
        heads: of keys or values.
        D: size of a head.
        block: tokens of a block.
    """

    def __init__(self, kind: str, heads: int, D: int, block: int) -> None:
        super().__init__()
        self.weights = self.linear = self.positions = self.mlp_in = self.mlp_out = None
        if kind == "mean":
            return
        self.positions = nn.Parameter(torch.zeros(heads, block, D))
        share = torch.eye(D).expand(heads, block, D, D) / block
        if kind == "weights":
            self.weights = nn.Parameter(torch.full((heads, block), 1 / block))
        elif kind == "linear":
            self.linear = nn.Parameter(share.clone())
        else:
            # GELU(x) - GELU(-x) = x
            self.mlp_in = nn.Parameter(torch.cat([share, -share], dim=-1))
            back = torch.eye(D).expand(heads, D, D)
            self.mlp_out = nn.Parameter(torch.cat([back, -back], dim=1))

    @property
    def mlp(self) -> tuple[Tensor, ...]:
        """Both maps of an MLP, or nothing.

        They hang at this module: what moves parameters when a module is called would find no call
        of a list of them.
        """
        return tuple(t for t in (self.mlp_in, self.mlp_out) if t is not None)

    def forward(self, x: Tensor, **sizes: Any) -> Tensor:
        """Map x [B T Hk D] to [B N Hk D] as ``compress_blocks`` does."""

        def own(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(x.dtype)

        mlp: Any = tuple(own(t) for t in self.mlp) or None
        return compress_blocks(
            x, weights=own(self.weights), linear=own(self.linear), mlp=mlp,
            positions=own(self.positions), **sizes,
        )  # fmt: skip


class SparseParts(nn.Module):
    """What the mode brings to an attention layer.

    State: ``gates``, ``keys`` and ``values`` (compressors); with projections of their own for each
    branch also ``compressed_k_proj``, ``compressed_v_proj``, ``window_k_proj`` and
    ``window_v_proj``, which become ternary with those of the model; those of the layer are the ones
    of the chosen blocks.

    Args:
        config: of the model.
        block: tokens of a compression block.
        compression: one of ``COMPRESSIONS``.
        shared_kv: whether there are no further projections.
    """

    ternary = True  # the projections: all else has no linears

    def __init__(self, config: Any, block: int, compression: str, shared_kv: bool) -> None:
        super().__init__()
        K, heads, kv_heads = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        )  # fmt: skip
        self.head_dim = getattr(config, "head_dim", None) or K // heads
        self.gates = Gates(K, heads)
        self.keys = Compressor(compression, kv_heads, self.head_dim, block)
        self.values = Compressor(compression, kv_heads, self.head_dim, block)
        self.branches = () if shared_kv else ("compressed", "window")
        for name in self._projections():
            linear = nn.Linear(K, kv_heads * self.head_dim, bias=config.attention_bias)
            self.add_module(name, linear)

    def _projections(self) -> list[str]:
        return [f"{branch}_{part}_proj" for branch in self.branches for part in "kv"]

    def init_from(self, attention: nn.Module) -> None:
        """Start further projections as copies of those of ``attention``."""
        for name in self._projections():
            own = attention.get_submodule(name.split("_", 1)[1])
            self.add_module(name, copy.deepcopy(own))

    def projected(self, branch: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys, not rotated, and values [B T Hk D] of a branch."""
        keys, values = (self.get_submodule(f"{branch}_{part}_proj")(x) for part in "kv")
        return keys.unflatten(-1, (-1, self.head_dim)), values.unflatten(-1, (-1, self.head_dim))
