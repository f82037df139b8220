"""Start the kernels of linear attention: what a call shares, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.linear_attention.backward import (
    _linear_attention_bwd_keys_kernel,
    _linear_attention_bwd_pairs_kernel,
    _linear_attention_bwd_states_kernel,
)
from bitnet_triton.kernels.linear_attention.forward import (
    _linear_attention_out_kernel,
    _linear_attention_pairs_kernel,
    _linear_attention_states_kernel,
    _linear_attention_sums_kernel,
)
from bitnet_triton.kernels.linear_attention.reference import LEAST_LOG_DECAY
from bitnet_triton.runtime import cdiv, launch
from bitnet_triton.runtime.autotune import gpu_family, head_size, tiles


@dataclass(frozen=True)
class _Chunks:
    """How the tokens of a call are cut.

    Attributes:
        T: tokens of a batch, or of all packed sequences.
        n: chunks of a batch.
        number: of chunks, of packed sequences at least.
        sequences: their number.
        table: int32 [number 2], the first token and the number of tokens of each chunk, or None.
        starts: int32 [sequences + 1], the first chunk of each sequence, or None.
    """

    T: int
    n: int
    number: int
    sequences: int
    table: Tensor | None
    starts: Tensor | None


def _cut(q: Tensor, cu_seqlens: Tensor | None, size: int) -> _Chunks:
    """Cut the tokens into chunks of ``size``; nothing waits for the device."""
    if cu_seqlens is None:
        B, T = q.shape[:2]
        n = cdiv(T, size)
        return _Chunks(T, n, B * n, B, None, None)
    T, B = q.shape[0], cu_seqlens.shape[0] - 1
    number = T // size + B
    starts = torch.zeros_like(cu_seqlens)
    counts = torch.div(cu_seqlens.diff() + size - 1, size, rounding_mode="floor")
    starts[1:] = counts.cumsum(0)
    chunk = torch.arange(number, dtype=torch.int32, device=q.device)
    b = torch.searchsorted(starts[1:].contiguous(), chunk, right=True).clamp_max(B - 1)
    first = cu_seqlens[b] + (chunk - starts[b]) * size
    # of those behind the last one none, or fewer than none
    count = (cu_seqlens[b + 1] - first).clamp_max(size)
    return _Chunks(T, 0, number, B, torch.stack((first, count), 1).int().contiguous(), starts)


class _Call:
    """What the launches of a call share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
        initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.log_decay = None if log_decay is None else log_decay.contiguous()
        self.beta = None if beta is None else beta.contiguous()
        self.initial = None if initial_state is None else initial_state.contiguous()
        self.H, self.D = q.shape[-2:]
        self.Hk, self.DV = v.shape[-2:]
        self.rows = q.shape[:-2].numel()
        self.size = head_size(max(self.D, self.DV), q.dtype)
        self.block_t = self.tiles("sums")["BLOCK_T"]
        self.chunks = _cut(q, cu_seqlens, self.block_t)
        is_rounded = q.dtype != torch.float32 and q.device.type != "cpu"
        # TF32 keeps 11 bits, as float16 does, and its range is that of float32
        rounded = is_rounded and gpu_family(q.device) != "hip"
        self.constants = {
            "D": self.D,
            "DECAY": 0 if log_decay is None else 1 + (log_decay.ndim == k.ndim),
            "PRECISION": "tf32" if rounded else "ieee",
        }

    def tiles(self, kernel: str) -> dict[str, int]:
        return tiles(f"linear_attention_{kernel}", self.size, self.q.device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def squares(self, heads: int) -> Tensor:
        return self.empty(self.chunks.number, heads, self.block_t, self.block_t)

    def states(self) -> Tensor:
        return self.empty(self.chunks.number, self.Hk, self.D, self.DV)

    @property
    def levels(self) -> int:
        return self.block_t.bit_length() - 1

    def sums(self) -> Tensor | None:
        """Return the sums of decays inside of chunks."""
        if self.log_decay is None:
            return None
        sums = self.empty(*self.log_decay.shape)
        config, chunks = self.tiles("sums"), self.chunks
        N = sums.numel() // self.rows
        launch(_linear_attention_sums_kernel, (chunks.number, cdiv(N, config["BLOCK_N"])))(
            self.log_decay, sums, chunks.table, chunks.T, chunks.n, N, LEAST_LOG_DECAY, **config
        )
        return sums

    def pairs(self, x: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
        """Return weights of keys for queries, or with ``beta`` the inverse of those for keys."""
        heads, chunks = x.shape[-2], self.chunks
        pairs = self.squares(heads)
        launch(_linear_attention_pairs_kernel, (chunks.number, heads))(
            x, self.k, g, beta, pairs, chunks.table, *strides(x), *strides(self.k),
            chunks.T, chunks.n, self.Hk, heads // self.Hk, self.levels, self.scale,
            **self.constants, **self.tiles("pairs"),
        )  # fmt: skip
        return pairs

    def forward_states(
        self, g: Tensor | None, inverse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the tokens write, the states in front of the chunks, and the last ones."""
        chunks, config = self.chunks, self.tiles("states")
        u = self.v if inverse is None else self.empty(*self.v.shape)
        states, last = self.states(), self.empty(chunks.sequences, self.Hk, self.D, self.DV)
        grid = (cdiv(self.DV, config["BLOCK_V"]), self.Hk, chunks.sequences)
        launch(_linear_attention_states_kernel, grid)(
            self.k, self.v, g, self.beta, inverse, self.initial, last, u, states,
            chunks.table, chunks.starts, *strides(self.k), *strides(self.v), chunks.T, chunks.n,
            DV=self.DV, **self.constants, **config,
        )  # fmt: skip
        return u, states, last


def strides(t: Tensor) -> tuple[int, ...]:
    """Return the strides of batch, tokens and heads; packed sequences have no batch."""
    return (0, *t.stride()[:2]) if t.ndim == 3 else t.stride()[:3]


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Map the inputs of the op to out, in float32 if ``wide``, and to the last states."""
    call = _Call(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale)
    g = call.sums()
    inverse = None if call.beta is None else call.pairs(k, g, call.beta)
    u, states, last = call.forward_states(g, inverse)
    pairs = call.pairs(q, g, None)
    dtype = torch.float32 if wide else q.dtype
    out = call.empty(*q.shape[:-1], call.DV, dtype=dtype)
    chunks, group, config = call.chunks, call.H // call.Hk, call.tiles("out")
    grid = (chunks.number, call.H, cdiv(call.DV, config["BLOCK_V"]))
    launch(_linear_attention_out_kernel, grid)(
        q, u, g, pairs, states, out, chunks.table, *strides(q), *strides(u),
        chunks.T, chunks.n, group, scale,
        DV=call.DV, **call.constants, **config,
    )  # fmt: skip
    return out, last


def launch_backward(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    log_decay: Tensor | None, beta: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the inputs; an empty tensor for one that is not given."""
    call = _Call(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale)
    chunks, group = call.chunks, call.H // call.Hk
    dout = dout.contiguous()
    dstate = None if dstate is None else dstate.contiguous()
    g = call.sums()
    inverse = None if call.beta is None else call.pairs(k, g, call.beta)
    u, states, _ = call.forward_states(g, inverse)
    pairs = call.pairs(q, g, None)

    dinitial = None if call.initial is None else torch.empty_like(call.initial)
    dv, dstates = call.empty(*v.shape, dtype=v.dtype), call.states()
    w = None if call.beta is None else call.empty(*v.shape)
    config = call.tiles("bwd_states")
    grid = (cdiv(call.DV, config["BLOCK_V"]), call.Hk, chunks.sequences)
    launch(_linear_attention_bwd_states_kernel, grid)(
        q, k, dout, g, call.beta, pairs, inverse, dstate, dinitial, dv, w, dstates,
        chunks.table, chunks.starts, *strides(q), *strides(k), chunks.T, chunks.n, group, scale,
        DV=call.DV, **call.constants, **config,
    )  # fmt: skip
    dpairs = _pair_gradients(call, dout, u, None)
    products = None if w is None else call.empty(call.rows, call.Hk)
    dkeys = None if w is None else _pair_gradients(call, w, u, products)
    dq, dk, dlog_decay, dbeta = _token_gradients(
        call, dout, u, g, w, states, dstates, dpairs, dkeys
    )
    if call.beta is not None and beta is not None:
        assert products is not None
        dbeta = (dbeta.sum(0) + products).view(beta.shape).to(beta.dtype)
    if log_decay is not None:
        total = dlog_decay if log_decay.ndim == k.ndim else dlog_decay.sum(0)
        dlog_decay = total.view(log_decay.shape).to(log_decay.dtype)
    return (
        dq, dk, dv,
        q.new_empty([0]) if log_decay is None else dlog_decay,
        q.new_empty([0]) if beta is None else dbeta,
        q.new_empty([0]) if dinitial is None else dinitial,
    )  # fmt: skip


def _pair_gradients(call: _Call, x: Tensor, u: Tensor, products: Tensor | None) -> Tensor:
    heads, chunks = x.shape[-2], call.chunks
    dpairs = call.squares(heads)
    launch(_linear_attention_bwd_pairs_kernel, (chunks.number, heads))(
        x, u, call.v, dpairs, products, chunks.table, *strides(u), *strides(call.v),
        chunks.T, chunks.n, heads // call.Hk,
        DV=call.DV, PRECISION=call.constants["PRECISION"],
        **call.tiles("bwd_pairs"),
    )  # fmt: skip
    return dpairs


def _token_gradients(
    call: _Call, dout: Tensor, u: Tensor, g: Tensor | None, w: Tensor | None, states: Tensor,
    dstates: Tensor, dpairs: Tensor, dkeys: Tensor | None,
) -> tuple[Tensor, Tensor, Any, Any]:  # fmt: skip
    """Return the gradients of q, k, log_decay and beta; of heads a part for each tile of D."""
    config, chunks, q, k = call.tiles("bwd_keys"), call.chunks, call.q, call.k
    tiles_d = cdiv(call.D, config["BLOCK_D"])
    dq, dk = (call.empty(*t.shape, dtype=t.dtype) for t in (q, k))
    parts = (tiles_d, call.rows, call.Hk)
    dbeta = None if w is None else call.empty(*parts)
    dlog_decay = None
    if g is not None:
        dlog_decay = call.empty(*(k.shape if g.ndim == k.ndim else parts))
    launch(_linear_attention_bwd_keys_kernel, (chunks.number, call.Hk, tiles_d))(
        q, k, u, dout, g, call.beta, w, states, dstates, dpairs, dkeys,
        dq, dk, dlog_decay, dbeta, chunks.table,
        *strides(q), *strides(k), *strides(u), chunks.T, chunks.n, call.rows,
        call.H // call.Hk, call.levels, call.scale, DV=call.DV, **call.constants, **config,
    )  # fmt: skip
    return dq, dk, dlog_decay, dbeta
