"""What mode ``linear`` brings to an attention layer: gates, a short convolution, feature maps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_triton.nn import Hedgehog, Performer, elu_plus_one

FEATURE_MAPS = ("elu", "relu", "performer", "hedgehog")
# how much of a state one token lets decay at the start, from the first head to the last
_FIRST_DECAY, _LAST_DECAY = 1e-3, 1e-1
# SiLU of it is 1: gates start open, where two small matrices would begin near 0 and learn slowly
_OPEN = 1.278465
_EPS_NORM, _EPS_LENGTH = 1e-6, 1e-6


class Gating(NamedTuple):
    """What hidden states say about a call.

    Attributes:
        beta: float32 [B T Hk], how far a token replaces what its key reads.
        log_decay: float32 [B T Hk] or [B T Hk D], at most 0.
        gate: float32 [B T H D], of the output, before the SiLU.
    """

    beta: Tensor
    log_decay: Tensor
    gate: Tensor


class LinearGates(nn.Module):
    """Maps hidden states [B T K] to beta, the decay and the output gate.

    One matrix maps them to beta, the decay and the inner half of the output gate. That gate, and
    the decay of channels, go through D numbers as in Kimi Linear (arXiv:2510.26692): full matrices
    would weigh more than all ternary ones of the layer.

    Args:
        sizes: K, H, Hk and D.
        of_channels: whether every channel of a key decays by itself (KDA), not a head as a whole.
        std: of the random start.

    Attributes:
        inputs: [Hk + (D or Hk) + D, K].
        decay_out: [Hk D, D], with ``of_channels``; None without.
        gate_out: [H D, D].
        gate_bias: [H D].
        log_rate: [Hk], logarithm of what multiplies the decay.
        decay_bias: [Hk] or [Hk D].
    """

    def __init__(self, sizes: tuple[int, int, int, int], of_channels: bool, std: float) -> None:
        super().__init__()
        K, H, Hk, D = self.sizes = sizes
        inner = D if of_channels else Hk
        self.inputs = nn.Parameter(std * torch.randn(Hk + inner + D, K))
        self.gate_out = nn.Parameter(std * torch.randn(H * D, D))
        self.gate_bias = nn.Parameter(torch.full((H * D,), _OPEN))
        self.decay_out = nn.Parameter(std * torch.randn(Hk * D, D)) if of_channels else None
        self.log_rate = nn.Parameter(torch.zeros(Hk))
        decay = torch.linspace(math.log(_FIRST_DECAY), math.log(_LAST_DECAY), Hk).exp()
        bias = decay.expm1().log()  # the inverse of softplus
        self.decay_bias = nn.Parameter(bias.repeat_interleave(D) if of_channels else bias)

    def forward(self, x: Tensor) -> Gating:
        """Map hidden states [B T K] to what they say."""
        _, H, Hk, D = self.sizes
        inner = self.inputs.shape[0] - Hk - D
        beta, decay, gate = F.linear(x, self.inputs.to(x.dtype)).split([Hk, inner, D], dim=-1)
        if self.decay_out is not None:
            decay = F.linear(decay, self.decay_out.to(x.dtype))
        decay = F.softplus(decay.float() + self.decay_bias.float())
        rate = -self.log_rate.float().exp()
        if self.decay_out is not None:
            decay, rate = decay.unflatten(-1, (Hk, D)), rate[:, None]
        gate = F.linear(gate, self.gate_out.to(x.dtype)).unflatten(-1, (H, D))
        gate = gate.float() + self.gate_bias.float().view(H, D)
        return Gating(beta.float().sigmoid(), rate * decay, gate)


class ShortConvolution(nn.Module):
    """Sums each channel over its latest tokens, and applies SiLU.

    Args:
        channels: C.
        taps: tokens that are summed, at least 2.
        std: of the random start of all but the last tap.

    Attributes:
        weight: [C taps], the last tap that of the token itself, with which it starts.
    """

    def __init__(self, channels: int, taps: int, std: float) -> None:
        super().__init__()
        weight = std * torch.randn(channels, taps)
        weight[:, -1] = 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, first: Tensor | None) -> Tensor:
        """Map x [B R + T C], R = taps - 1 tokens before those of the call, to [B T C].

        Args:
            x: inputs.
            first: int64 [T], where the packed sequence of each token begins; None: one a row.
        """
        taps = self.weight.shape[1]
        T = x.shape[1] - taps + 1
        w = self.weight.float()
        total = x[:, taps - 1 :].float() * w[:, -1]
        for back in range(1, taps):
            former = x[:, taps - 1 - back : taps - 1 - back + T].float() * w[:, taps - 1 - back]
            if first is not None:
                inside = torch.arange(T, device=x.device) - back >= first
                former = former * inside[:, None]
            total = total + former
        return F.silu(total).to(x.dtype)


class GatedNorm(nn.Module):
    """Norms each head of an output, and opens it by SiLU of its gate.

    Attributes:
        weight: [D].
    """

    def __init__(self, D: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, out: Tensor, gate: Tensor) -> Tensor:
        """Map out [B T H D] and gate [B T H D] to [B T H D]."""
        x = out.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS_NORM)
        return (x * self.weight.float() * F.silu(gate)).to(out.dtype)


class GatedParts(nn.Module):
    """What the gated delta rule needs, in the form of Qwen3-Next's layers; all stays dense.

    Each part is called as a module: whoever moves parameters when a module is called finds them.

    Args:
        config: of the model.
        of_channels: whether every channel of a key decays by itself (KDA), not a head as a whole.
        taps: of the convolution over queries, keys and values; 1: there is none.
    """

    def __init__(self, config: Any, of_channels: bool, taps: int) -> None:
        super().__init__()
        K, H, Hk = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        D = getattr(config, "head_dim", None) or K // H
        std = config.initializer_range
        self.gates = LinearGates((K, H, Hk, D), of_channels, std)
        self.convolution = None
        if taps > 1:
            self.convolution = ShortConvolution((H + 2 * Hk) * D, taps, std)
        self.norm = GatedNorm(D)


def unit(x: Tensor) -> Tensor:
    """Return x [.. D] at length 1, in its dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _EPS_LENGTH)).to(x.dtype)


class PlainParts(nn.Module):
    """Feature maps of queries and keys, which have none or some parameters; all stay dense.

    Args:
        config: of the model.
        kind: one of ``FEATURE_MAPS``.
    """

    def __init__(self, config: Any, kind: str) -> None:
        super().__init__()
        K, H, Hk = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        D = getattr(config, "head_dim", None) or K // H
        self.kind = kind
        self.queries: Hedgehog | None = None
        self.keys: Performer | Hedgehog | None = None
        if kind == "performer":  # the same rows: their products are what softmax weighs by
            self.keys = Performer(D)
        elif kind == "hedgehog":
            self.queries, self.keys = Hedgehog(H, D), Hedgehog(Hk, D)

    def extra_repr(self) -> str:
        """Return the kind, which parameters do not tell."""
        return self.kind

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Map q [B T H D] and k [B T Hk D] to features that are not negative."""
        if self.kind == "elu":
            return elu_plus_one(q), elu_plus_one(k)
        if self.kind == "relu":
            return F.relu(q), F.relu(k)
        assert self.keys is not None
        if self.queries is None:
            return self.keys(q, queries=True), self.keys(k)
        return self.queries(q), self.keys(k)

    def matrices(self) -> tuple[Tensor | None, Tensor | None]:
        """Return those of queries and of keys, where they lie; both None: the map has none."""
        queries = None if self.queries is None else self.queries.matrix()
        return queries, None if self.keys is None else self.keys.matrix()


def constant_log_decay(heads: int, device: torch.device) -> Tensor:
    """Return float32 [heads], ln(1 - 2^(-5 - h)) of RetNet (arXiv:2307.08621, eq. 8)."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, device=device))))
