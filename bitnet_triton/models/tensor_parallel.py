"""Tensor parallelism: a ternary model of which every process holds a part, for inference.

transformers makes the processes and their mesh, from ``tp_plan`` or ``distributed_config``; here
its plan is carried out, because its own styles divide float matrices. Heads, the width of the MLP
and the vocabulary are divided; a process reads its part of each tensor of the checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_triton.kernels.packing import CODES_PER_BYTE, pack_codes, unpack_codes
from bitnet_triton.models.checkpoint import (
    Entry,
    by_model_name,
    keeps_masters,
    open_checkpoint,
    read_headers,
)
from bitnet_triton.nn import BitLinear, OutputHead, PackedBitLinear
from bitnet_triton.nn.divided import (
    MOST_COLUMNS,
    ColumnPart,
    EmbeddingPart,
    HeadPart,
    NormPart,
    Part,
    Processes,
    RowPart,
)

logger = logging.getLogger("bitnet_triton")

# What is divided, in the words of transformers' plans; sub-norms follow the rows behind them
DECODER_PLAN = {
    "embed_tokens": "embedding_rowwise",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
HEAD_PLAN = {"lm_head": "colwise_gather_output"}
_NORMS = ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm")


def check_division(model: Any, wanted: Any) -> None:
    """Raise where a model cannot be divided as ``wanted`` says.

    Args:
        model: with its final linears.
        wanted: a ``DistributedConfig`` of transformers with ``tp_size`` above 1.

    Raises:
        ValueError: it asks for another kind of parallelism too, or for a plan of its own; the
            model has an attention plan, reversible layers, dense linears or norms inside of
            linears; heads or the width of the MLP cannot be divided.
    """
    for name in ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size"):
        if (getattr(wanted, name, None) or 1) > 1:
            raise ValueError(f"`{name}`: expected 1 beside `tp_size`, got {getattr(wanted, name)}")
    if wanted.tp_plan not in (None, "auto"):
        raise ValueError(
            '`tp_plan`: expected "auto": parts of a ternary model are divided together'
        )
    config, size = model.config, wanted.tp_size
    for name in ("attention", "cache", "reversible"):
        if getattr(config, name):
            raise ValueError(f"`tp_plan`: a model with `{name}` cannot be divided among processes")
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise ValueError(
                f"`tp_size`: expected a divisor of {name}={getattr(config, name)}, got {size}"
            )
    _check_linears(model, size)


def _check_linears(model: Any, size: int) -> None:
    for name, linear, kind in _linears(model):
        is_ternary = isinstance(linear, (BitLinear, PackedBitLinear))
        if not is_ternary:
            raise ValueError(f"`tp_plan`: {name}: expected ternary weights, got dense ones")
        if linear.rms_norm is not None and kind is RowPart:
            raise ValueError(f"`tp_plan`: {name}: a norm inside of a linear cannot be divided")
        N, K = linear.out_features, linear.in_features
        rows = _rows(name, N, model.config, size)
        if kind is ColumnPart and rows % CODES_PER_BYTE:
            raise ValueError(
                f"`tp_size`: {name}: expected parts of a multiple of {CODES_PER_BYTE} rows, got "
                f"{rows} of {N} rows for each of {size} processes"
            )
        if K > MOST_COLUMNS:
            raise ValueError(f"`tp_plan`: {name}: expected at most {MOST_COLUMNS} columns, got {K}")


def divide(model: Any, processes: Processes, files: Sequence[str | Path]) -> dict[str, Tensor]:
    """Put parts in the place of a model's layers, and read what the checkpoint has for them.

    Args:
        model: on the device "meta", as ``check_division`` wants it.
        processes: those that hold it.
        files: a checkpoint that ``check_checkpoint`` has accepted.

    Returns:
        The state of the model as it is now, read.
    """
    entries = by_model_name(model, read_headers(files))
    state: dict[str, Tensor] = {}
    for name, part, read in _parts(model, processes):
        model.set_submodule(name, part)
        state |= {f"{name}.{key}": value for key, value in read(entries, name).items()}
    heads = key_heads(model.config, processes.size)
    for _, layer in _layers(model):
        of_process = model.config.num_attention_heads // processes.size
        layer.self_attn.num_key_value_groups = of_process // len(heads[processes.rank])
    for name in model.state_dict():
        if name not in state and name in entries:
            state[name] = _read(entries[name])
    return state


def key_heads(config: Any, size: int) -> list[list[int]]:
    """Return the heads of keys and values that each of ``size`` processes has, in its order.

    Queries of a process may be fewer than those that share a head of keys, or end in the middle of
    them. It has such a head several times then, so that each serves equally many queries.
    """
    own = config.num_attention_heads // size
    shared = config.num_attention_heads // config.num_key_value_heads
    served = math.gcd(own, shared)
    firsts = range(0, config.num_attention_heads, served)
    heads = [first // shared for first in firsts]
    count = own // served
    return [heads[rank * count : (rank + 1) * count] for rank in range(size)]


def _blocks(name: str, config: Any, size: int) -> list[list[int]]:
    """Return the blocks of rows of a matrix that each of ``size`` processes has."""
    if name.endswith(("k_proj", "v_proj")):
        return key_heads(config, size)
    return [[rank] for rank in range(size)]


def _rows(name: str, N: int, config: Any, size: int) -> int:
    """Return how many of the N rows of a matrix a process has."""
    blocks = _blocks(name, config, size)
    return N // len({block for own in blocks for block in own}) * len(blocks[0])


def joined_state(model: nn.Module, state: dict[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return the whole state of a divided model, on the CPU; every process calls it.

    Args:
        model: as ``divide`` has left it.
        state: of this process.
        keep: whether this process wants the result; it is empty otherwise.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied tensors stay one
    for name, tensor in state.items():
        path, _, key = name.rpartition(".")
        part, address = model.get_submodule(path), tensor.data_ptr()
        if isinstance(part, Part) and key in part.divided:
            if address not in seen:
                parts = part.processes.gather(tensor.detach())
                seen[address] = part.joined(key, parts).cpu() if keep else tensor
            tensor = seen[address]
        if keep:
            whole[name] = tensor.detach().cpu().contiguous()
    return whole


def count_beyond(model: nn.Module) -> int:
    """Return how many weights parts stand for that are no parameters of this process."""
    parts = {id(part.weight): part for part in model.modules() if isinstance(part, Part)}
    return sum(p.count() - sum(w.numel() for w in p.parameters()) for p in parts.values())


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for i, layer in enumerate(model.base_model.layers):
        yield f"{prefix}layers.{i}", layer


def _linears(model: Any) -> Iterator[tuple[str, Any, type[ColumnPart] | type[RowPart]]]:
    for start, layer in _layers(model):
        for pattern, style in DECODER_PLAN.items():
            if pattern.startswith("layers."):
                name = pattern.removeprefix("layers.*.")
                kind = ColumnPart if style == "colwise" else RowPart
                yield f"{start}.{name}", layer.get_submodule(name), kind


def _parts(model: Any, processes: Processes) -> list[tuple[str, Part, Any]]:
    """Return names, parts on the device "meta", and what reads their state."""
    words, size = model.config.vocab_size, processes.size
    rows = _RowsReader(processes)
    parts: list[tuple[str, Part, Any]] = []
    with torch.device("meta"):
        for name, linear, kind in _linears(model):
            part = _linear_part(name, linear, kind, model.config, processes)
            parts.append((name, part, _LinearReader(linear, part)))
        for start, layer in _layers(model):
            for name in _NORMS:
                norm = layer.get_submodule(name)
                width, dtype = norm.weight.shape[0] // size, norm.weight.dtype
                own = NormPart(processes, width, eps=norm.variance_epsilon, dtype=dtype)
                parts.append((f"{start}.{name}", own, rows))
        if words % size:
            logger.info("the vocabulary of %d tokens stays whole in %d processes", words, size)
            return parts
        for name, table in _tables(model):
            width, dtype = table.weight.shape[1], table.weight.dtype
            made = HeadPart if isinstance(table, OutputHead) else EmbeddingPart
            parts.append((name, made(processes, words // size, width, dtype=dtype), rows))
    return parts


def _tables(model: Any) -> Iterator[tuple[str, Any]]:
    """Return what has a row for each token, by name."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    yield f"{prefix}embed_tokens", model.get_input_embeddings()
    if type(model.get_output_embeddings()) is OutputHead:
        yield "lm_head", model.get_output_embeddings()


def _linear_part(
    name: str,
    linear: Any,
    kind: type[ColumnPart] | type[RowPart],
    config: Any,
    processes: Processes,
) -> ColumnPart | RowPart:
    N, K, size = linear.out_features, linear.in_features, processes.size
    settings = {
        # a master weight is packed as `autobitlinear` packs it
        "scale_divides": getattr(linear, "scale_divides", False),
        "rms_norm": linear.rms_norm,
        "bias_dtype": None if linear.bias is None else linear.bias.dtype,
    }
    if kind is RowPart:
        return RowPart(processes, K // size, N, **settings)
    rows = _rows(name, N, config, size)
    return ColumnPart(processes, _blocks(name, config, size), K, rows, **settings)


def _read(entry: Entry) -> Tensor:
    with open_checkpoint(entry.file) as opened:
        return opened.get_tensor(entry.name)


class _RowsReader:
    """Reads some rows of a weight that is stored as it is."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def __call__(self, entries: dict[str, Entry], name: str) -> dict[str, Tensor]:
        entry = entries.get(f"{name}.weight")
        if entry is None:  # tied to another
            return {}
        with open_checkpoint(entry.file) as opened:
            part = opened.get_slice(entry.name)[self.processes.share(entry.shape[0])]
        return {"weight": part.clone()}  # not the mapped file


class _LinearReader:
    """Reads some rows or columns of a ternary matrix, however it is stored, and packs them."""

    def __init__(self, linear: Any, part: ColumnPart | RowPart) -> None:
        self.linear, self.part = linear, part

    def __call__(self, entries: dict[str, Entry], name: str) -> dict[str, Tensor]:
        stored = {
            key: _read(entries[f"{name}.{key}"])
            for key in ("weight", "weight_scale", "bias")
            if f"{name}.{key}" in entries
        }
        whole = self._packed(stored)
        packed = whole["weight"]
        if isinstance(self.part, RowPart):
            columns = self.part.processes.share(packed.shape[1])
            return {**whole, "weight": packed[:, columns].clone()}
        rows = self.part.rows()
        whole["weight"] = pack_codes(unpack_codes(packed)[rows])
        if "bias" in whole:
            whole["bias"] = whole["bias"][rows]
        return whole

    def _packed(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a ``PackedBitLinear`` with this weight holds."""
        weight = stored["weight"]
        if isinstance(self.linear, PackedBitLinear):
            scale = stored["weight_scale"].float().reshape(1)
            packed = weight if weight.dtype == torch.uint8 else pack_codes(weight.to(torch.int8))
            return {**stored, "weight": packed, "weight_scale": scale}
        # a master weight is quantised in the dtype of the model, as its linear would do it
        with torch.device("meta"):
            master = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        dtype = self.linear.weight.dtype
        master.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if "bias" in stored:
            master.bias = nn.Parameter(stored["bias"].to(dtype), requires_grad=False)
        layer = PackedBitLinear.from_linear(master)
        return {key: value for key, value in layer.state_dict().items() if value is not None}


def check_saving(model: Any, *, distributed_checkpoint: bool) -> None:
    """Raise where a divided model cannot be saved.

    Raises:
        ValueError: its master weights are gone, or each process is to write its own part.
    """
    if distributed_checkpoint:
        raise ValueError("`distributed_checkpoint`: expected False for a ternary model in parts")
    if keeps_masters(model.config):
        raise ValueError(
            "a model that is divided among processes keeps codes of its master weights, not these: "
            "its checkpoint stands where it was loaded from"
        )
