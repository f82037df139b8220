"""Layers of which every process of a group holds a part: tensor parallelism, for inference.

A ``ColumnPart`` has some rows of a packed matrix and makes some of the outputs, from all inputs; a
``RowPart`` has some columns, takes the inputs that the processes made, and adds up what they make
of them. The scale of an activation belongs to its whole row, so a ``RowPart`` asks all processes
for the largest magnitude first; its integer sums are exact in float32, and are added before any
scale: all processes together give the product of one, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_triton.kernels import (
    TernaryWeight,
    dense_linear,
    dense_linear_topk,
    ternary_linear,
    ternary_linear_quantized,
)
from bitnet_triton.kernels.packing import CODES_PER_BYTE, pack_codes, unpack_codes
from bitnet_triton.kernels.quantize.by_magnitude import quantize_by_magnitude

# an int8 code times a ternary one, summed so often, is still an integer that float32 holds
MOST_COLUMNS = 2**24 // 128


class Processes:
    """The processes that hold a model together; collective calls, which all of them make.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict) -> Processes:
        return self  # copies of a model talk by the same group

    def share(self, length: int) -> slice:
        """Return what this process holds of ``length`` things, a multiple of ``size``."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def add(self, values: Tensor) -> Tensor:
        """Add up the values of all processes, in place."""
        if values.numel():
            dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Take the largest values of all processes, in place."""
        if values.numel():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return the values of every process, all of one shape, in the order of ranks."""
        values = values.contiguous()
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values, group=self.group)
        return gathered

    def take_from_first(self, values: Tensor) -> Tensor:
        """Overwrite values by those of the first process."""
        dist.broadcast(values, dist.get_global_rank(self.group, 0), group=self.group)
        return values


def share_random_state(processes: Processes, device: torch.device) -> None:
    """Let all processes draw what the first would: tokens that are sampled have to be the same."""
    if device.type == "cpu":
        torch.set_rng_state(processes.take_from_first(torch.get_rng_state()))
        return
    generators = torch.get_device_module(device)
    state = generators.get_rng_state(device)  # on the CPU, where NCCL does not reach
    shared = processes.take_from_first(state.to(device))
    generators.set_rng_state(shared.cpu(), device)


class Part(nn.Module):
    """A layer of which this process holds a part.

    No ``nn.Linear`` and no ``nn.Embedding``: tools that put adapters beside those, or resize them,
    would take a part for the whole.
    """

    # tensors of the state that are divided, and along which dimension
    divided: ClassVar[dict[str, int]] = {"weight": 0}

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """Put the parts of a tensor of the state together."""
        return torch.cat(parts, self.divided[name])

    def count(self) -> int:
        """Return how many weights the whole layer stands for."""
        return self.processes.size * sum(p.numel() for p in self.parameters())

    def _check_no_gradient(self, x: Tensor) -> None:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                "a model that is divided among processes is for inference: expected inputs without "
                "a gradient"
            )


class _PackedPart(Part):
    """Part of a ``PackedBitLinear``, with its state."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        processes: Processes,
        in_features: int,
        out_features: int,
        *,
        scale_divides: bool,
        rms_norm: nn.Module | None = None,
        bias_dtype: torch.dtype | None = None,
        whole_bias: int = 0,
    ) -> None:
        super().__init__(processes)
        self.in_features, self.out_features = in_features, out_features
        self.scale_divides, self.rms_norm = scale_divides, rms_norm
        packed = torch.empty((out_features // CODES_PER_BYTE, in_features), dtype=torch.uint8)
        self.register_buffer("weight", packed)
        self.register_buffer("weight_scale", torch.empty(1, dtype=torch.float32))
        has_bias = bias_dtype is not None
        bias = torch.empty(whole_bias or out_features, dtype=bias_dtype) if has_bias else None
        self.register_buffer("bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _PackedPart:
        dtype = self.weight_scale.dtype
        super()._apply(fn, recurse)
        self.weight_scale = self.weight_scale.to(dtype)  # as that of a PackedBitLinear
        return self

    @property
    def ternary_weight(self) -> TernaryWeight:
        """The part of the weight as the ops read it."""
        scale = self.weight_scale.float()
        return TernaryWeight(self.weight, scale.reciprocal() if self.scale_divides else scale)

    def _scaled_bias(self) -> Tensor | None:
        if self.bias is None or self.scale_divides:
            return self.bias
        return self.bias * self.weight_scale

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, part "
            f"{self.processes.rank + 1} of {self.processes.size}"
        )


class ColumnPart(_PackedPart):
    """Some rows of a packed matrix: some outputs, from all inputs.

    State: as ``PackedBitLinear``, with the rows of this process packed anew: a byte holds four
    rows that lie a quarter of the matrix apart, so no run of bytes holds a run of rows.

    Args:
        processes: those that hold the matrix.
        blocks: of rows, equally many in each, that each of the processes has, in its order. A
            block may be with several of them, and with one several times.
        in_features: K.
        out_features: of this process.
        **kwargs: as for any part of a packed matrix.
    """

    divided: ClassVar[dict[str, int]] = {"weight": 0, "bias": 0}

    def __init__(
        self,
        processes: Processes,
        blocks: list[list[int]],
        in_features: int,
        out_features: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(processes, in_features, out_features, **kwargs)
        self.blocks = blocks
        self.block_rows = out_features // len(blocks[processes.rank])

    def rows(self) -> Tensor:
        """Return which rows of the matrix this process has, int64 [rows]."""
        first = torch.tensor(self.blocks[self.processes.rank]) * self.block_rows
        return (first[:, None] + torch.arange(self.block_rows)).reshape(-1)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., K] to the outputs [..., N / processes] of this process."""
        self._check_no_gradient(input)
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        return ternary_linear(input, self.ternary_weight, self._scaled_bias())

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """Put the parts of a tensor of the state together."""
        is_packed = name == "weight"
        found = [
            piece
            for part in parts
            for piece in (unpack_codes(part) if is_packed else part).split(self.block_rows)
        ]
        order = [block for blocks in self.blocks for block in blocks]
        whole = torch.cat([found[order.index(block)] for block in sorted({*order})])
        return pack_codes(whole) if is_packed else whole

    def count(self) -> int:
        """Return how many weights and biases the whole layer stands for."""
        N = self.block_rows * len({block for blocks in self.blocks for block in blocks})
        return self.in_features * N + (0 if self.bias is None else N)


class RowPart(_PackedPart):
    """Some columns of a packed matrix: all outputs, from the inputs of this process.

    State: as ``PackedBitLinear``, with the columns of this process.
    """

    divided: ClassVar[dict[str, int]] = {"weight": 1}

    def forward(self, input: Tensor) -> Tensor:
        """Map the inputs [..., K / processes] of this process to [..., N]."""
        self._check_no_gradient(input)
        rows = input.reshape(-1, self.in_features)
        # the bits of magnitudes order like the magnitudes, with NaN on top: a maximum may drop NaN
        bits = rows.abs().amax(-1, keepdim=True).float().view(torch.int32)
        gamma = self.processes.largest(bits).view(torch.float32)
        codes, scale, sums = quantize_by_magnitude(rows, gamma)
        weight = self.ternary_weight
        one = torch.ones_like(weight.scale)
        y = ternary_linear_quantized(
            codes, torch.ones_like(scale), sums, TernaryWeight(weight.packed, one),
            dtype=torch.float32,
        )  # fmt: skip
        y = self.processes.add(y) * (scale * weight.scale)
        bias = self._scaled_bias()
        if bias is not None:
            y = y + bias.float()
        return y.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def count(self) -> int:
        """Return how many weights and biases the whole layer stands for."""
        K, N = self.processes.size * self.in_features, self.out_features
        return K * N + (0 if self.bias is None else N)


class NormPart(Part):
    """An RMS norm over values that lie with several processes.

    State: ``weight`` [D / processes].
    """

    def __init__(
        self, processes: Processes, size: int, *, eps: float, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(processes)
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype), requires_grad=False)
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [..., D / processes] to the same shape, in the wider dtype of input and weight."""
        self._check_no_gradient(hidden_states)
        wide = hidden_states.float()
        squares = self.processes.add(wide.square().sum(-1, keepdim=True))
        whole = self.processes.size * self.weight.shape[0]
        rstd = (squares / whole + self.variance_epsilon).rsqrt()
        return self.weight * (wide * rstd).to(hidden_states.dtype)


class _VocabularyPart(Part):
    """Rows for some tokens of the vocabulary.

    State: ``weight`` [tokens / processes, D].
    """

    def __init__(
        self, processes: Processes, tokens: int, size: int, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(processes)
        self.weight = nn.Parameter(torch.empty(tokens, size, dtype=dtype), requires_grad=False)


class EmbeddingPart(_VocabularyPart):
    """The embeddings of some tokens of the vocabulary."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ids [...] to embeddings [..., D]."""
        tokens = self.weight.shape[0]
        torch._assert_async(
            ((input >= 0) & (input < tokens * self.processes.size)).all(),
            f"`input_ids`: expected ids from 0 to {tokens * self.processes.size - 1}",
        )
        own = input - self.processes.rank * tokens
        is_elsewhere = (own < 0) | (own >= tokens)
        found = F.embedding(own.clamp(0, tokens - 1), self.weight)
        return self.processes.add(found.masked_fill(is_elsewhere.unsqueeze(-1), 0))


class HeadPart(_VocabularyPart):
    """The output head for some tokens of the vocabulary."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., D] to the logits [..., tokens] of all processes."""
        self._check_no_gradient(input)
        rows = input.reshape(-1, input.shape[-1])
        logits = torch.cat(self.processes.gather(dense_linear(rows, self.weight)), -1)
        return logits.view(*input.shape[:-1], -1)

    def topk(self, input: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Return the k largest logits [..., k] of input [..., D], and the tokens they are of."""
        with torch.no_grad():
            values, tokens = dense_linear_topk(input, self.weight, min(k, self.weight.shape[0]))
        tokens = tokens + self.processes.rank * self.weight.shape[0]
        values = torch.cat(self.processes.gather(values), -1)
        tokens = torch.cat(self.processes.gather(tokens), -1)
        # stable: of equal logits the first token is taken, as one process does
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return values[..., :k], tokens.gather(-1, order[..., :k])
