"""Native Sparse Attention: compressed blocks, chosen blocks and a window (arXiv:2502.11089).

Keys are compressed as they are before their rotary embedding, and the compressed key is rotated to
the position of the first token of its block. Where a layer has one set of keys, they arrive rotated
and are turned back first: that is exact to rounding, so a cache keeps no others. Frequencies that
go by the length of a text are chosen once for a cache: keys are turned back by what turned them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitnet_triton.attention.checks import check_known, check_number
from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.masked import check_served
from bitnet_triton.attention.mode import Mode, Reads, Step, StepLayer, StepTensors
from bitnet_triton.attention.sparse_parts import COMPRESSIONS, SparseParts
from bitnet_triton.cache import CompressedLayer, Memory
from bitnet_triton.cache.compressed import POSITIONS
from bitnet_triton.cache.key_values import LEFTPAD, POSITION, USED
from bitnet_triton.kernels import (
    Mask,
    SparseBlocks,
    apply_rotary,
    native_sparse_attention,
    rotary_angles,
    select_blocks,
)
from bitnet_triton.kernels.native_sparse.arguments import block_tokens

KEYS, VALUES = "compressed_keys", "compressed_values"


@dataclass(frozen=True)
class NativeSparse(Mode):
    """Three branches, summed by gates that the hidden states open; the defaults are the paper's.

    Attributes:
        block: tokens of a compression block.
        stride: from one to the next; divides ``block`` and ``selection``.
        selection: tokens of a selection block, at least ``block``.
        selected: blocks that a token reads, the forced ones among them.
        initial: first blocks of the text, which every token reads.
        local: latest blocks, its own among them, which every token reads.
        window: latest keys that a token reads, itself included.
        compression: what becomes of a block: "mean"; "weights", a sum by learned weights;
            "linear", one map of all its tokens; "mlp", two with a GELU between. But for the mean,
            places in a block have embeddings. All of them start as the mean.
        shared_kv: whether one set of keys and values serves the three branches, as a model that was
            trained with full attention has it, or each has projections of its own, as in the paper.
    """

    block: int = 32
    stride: int = 16
    selection: int = 64
    selected: int = 16
    initial: int = 1
    local: int = 2
    window: int = 512
    compression: str = "weights"
    shared_kv: bool = True

    def __post_init__(self) -> None:
        for name in ("block", "stride", "selection", "selected", "window"):
            check_number(name, getattr(self, name), 1)
        for name in ("initial", "local"):
            check_number(name, getattr(self, name), 0)
        check_known("compression", self.compression, COMPRESSIONS)
        if not isinstance(self.shared_kv, bool):
            got = type(self.shared_kv).__name__
            raise TypeError(f"`attention`: 'shared_kv': expected true or false, got {got}")
        try:
            self.blocks  # noqa: B018 - checks how the sizes go together
        except ValueError as error:
            raise ValueError(f"`attention`: mode {self.name!r}: {error}") from error

    @property
    def blocks(self) -> SparseBlocks:
        """The sizes and numbers of blocks as the op takes them."""
        return SparseBlocks(
            self.block, self.stride, self.selection, self.selected, self.initial, self.local,
            self.window,
        )  # fmt: skip

    @property
    def reads_hidden_states(self) -> bool:
        """Gates read them, and projections."""
        return True

    def module(self, config: Any) -> nn.Module:
        """Return gates, compressors, and projections where branches have their own."""
        return SparseParts(config, self.block, self.compression, self.shared_kv)

    def memory(self, other: Mode) -> Memory:
        """Return a memory of everything and of compressed blocks."""
        if type(other) is type(self):
            settings = ("block", "stride", "compression", "shared_kv")
            for name in settings:
                mine, theirs = (getattr(mode, name) for mode in (self, other))
                if mine != theirs:
                    raise ValueError(
                        f"`attention`: both phases of {self.name!r} need the same {name!r}, got "
                        f"{mine} and {theirs}"
                    )
        elif other.brings_memory:
            raise ValueError(f"`attention`: no memory serves {self.name!r} and {other.name!r}")
        elif not self.shared_kv:
            raise ValueError(
                f"`attention`: {self.name!r} with keys of its own for each branch takes in every "
                f"token itself: expected no {other.name!r} in the other phase, or 'shared_kv'"
            )
        return CompressedLayer(self.block, self.stride)

    def remember(self, k: Tensor, context: AttentionContext) -> None:
        """Keep the positions of a call that another mode answers: its blocks are made later."""
        if isinstance(context.memory, CompressedLayer) and context.positions is not None:
            context.memory.place(context.positions)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        self._check(context)
        T, module = q.shape[1], cast("SparseParts", context.module)
        packed = context.tokens.cu_seqlens is not None
        if packed and k.shape[1] != T:
            raise ValueError("`position_ids`: packed sequences go without a cache")
        used = T if packed else int(context.tokens.offset) + T
        k, v = k[:, :used], v[:, :used]  # behind it a static cache has nothing
        gates = module.gates(context.hidden_states).to(q.dtype)
        call = _Call(self, module, context, used)
        k_window, v_window = call.window_keys(k, v)
        k_compressed, v_compressed = call.compressed(k, v)
        if packed:  # compressed ones are already
            q, k, v, gates = (t.flatten(0, 1) for t in (q, k, v, gates))
            if k_window is not None and v_window is not None:
                k_window, v_window = k_window.flatten(0, 1), v_window.flatten(0, 1)
        out: Any = native_sparse_attention(
            q, k, v, k_compressed, v_compressed, gates, blocks=self.blocks, scale=context.scale,
            k_window=k_window, v_window=v_window, **call.lengths,
        )  # fmt: skip
        return out.unflatten(0, (-1, T)) if packed else out

    def reads(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Reads:
        """Count compressed blocks, and the tokens that are chosen or in the window, each once."""
        used = int(context.tokens.offset) + q.shape[1]
        memory, left = context.memory, context.tokens.leftpad
        if not isinstance(memory, CompressedLayer) or left is not None:
            raise ValueError("`leftpad`: reads are counted with its own cache, without padding")
        count = memory.blocks(used)
        compressed = memory.more[KEYS][:, :, :count].transpose(1, 2)
        indices = select_blocks(
            q[:, -1:], compressed, blocks=self.blocks, tokens=used, scale=context.scale
        )[:, 0]  # [B Hk selected]
        tokens = torch.arange(used, device=q.device)
        is_read = (tokens // self.selection == indices[..., None]).any(-2)  # [B Hk used]
        is_read |= tokens >= used - self.window
        rows = count + is_read.sum(-1).float().mean().item()
        return Reads(rows, rows)

    def _check(self, context: AttentionContext) -> None:
        check_served(self, context)
        if context.softcap is not None or context.s_aux is not None:
            raise ValueError(f"`attention`: {self.name!r} has no bounded scores and no sinks")
        if context.frequencies is None and context.rotary_scale is not None:
            raise ValueError(
                f"`attention`: {self.name!r} turns compressed keys of all rows alike, and here "
                "texts of different lengths turn by different angles; give it batches of texts "
                "that are all within the trained length or all beyond it"
            )
        if context.module is None or context.frequencies is None or context.positions is None:
            raise ValueError(f"`attention`: {self.name!r} needs a layer that tells of its rotation")
        is_own = isinstance(context.memory, CompressedLayer)
        if torch.compiler.is_compiling() and context.is_cached and not is_own:
            raise ValueError(
                f"`attention`: {self.name!r} takes no other cache than its own in a compiled graph"
            )

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Write the new token, compress the block that it completes, and attend three times."""
        if not self.shared_kv:
            return "each branch projects keys and values of its own"
        if self.compression not in ("mean", "weights"):
            return f"compression {self.compression!r} has no kernel for one block"
        if not isinstance(memory, CompressedLayer) or KEYS not in memory.more:
            return "its cache has no compressed blocks"
        if (memory.block, memory.stride) != (self.block, self.stride):
            return "its cache has compressed blocks of other sizes"
        return _step_of(self, memory, layer)


def _step_of(mode: NativeSparse, memory: CompressedLayer, layer: StepLayer) -> Step:
    # Triton is imported on first use
    from bitnet_triton.kernels.flash_attention.decode import launch_decode
    from bitnet_triton.kernels.native_sparse.decode import launch_compressed_decode
    from bitnet_triton.kernels.native_sparse.gates import launch_gated_sum
    from bitnet_triton.kernels.native_sparse.step import launch_compress_step, launch_gates
    from bitnet_triton.kernels.selected_blocks.decode import launch_selected_decode

    blocks, scale = mode.blocks, layer.scale
    module = cast("SparseParts", layer.module)
    a, b = module.keys, module.values
    weights, embeddings = ((_read(x), _read(y)) for x, y in (
        (a.weights, b.weights), (a.positions, b.positions)
    ))  # fmt: skip
    gates = module.gates.weight, module.gates.bias

    def run(step: StepTensors) -> Tensor:
        places = step.places
        left, used = places[LEFTPAD], places[USED]
        q = memory.write(step.heads, step.cos, step.sin, places)
        keys, values = (store.transpose(1, 2) for store in memory.stores)
        k, v = (memory.more[name].transpose(1, 2) for name in (KEYS, VALUES))
        launch_compress_step(
            keys, values, k, v, blocks=blocks, weights=weights, places=embeddings, cos=step.cos,
            sin=step.sin, positions=memory.more[POSITIONS][:, 0, :, 0], leftpad=left, used=used,
            position=places[POSITION],
        )  # fmt: skip
        compressed, indices = launch_compressed_decode(
            q, k, v, blocks=blocks, scale=scale, tokens=keys.shape[1], leftpad=left, used=used
        )
        chosen, _ = launch_selected_decode(
            q, keys, values, indices, block=blocks.selection, scale=scale, leftpad=left,
            seqused=used,
        )  # fmt: skip
        window, _ = launch_decode(
            q, keys, values, mask=Mask(window=blocks.window), scale=scale, leftpad_k=left,
            seqused_k=used,
        )  # fmt: skip
        assert step.hidden_states is not None
        return launch_gated_sum(
            compressed, chosen, window, launch_gates(step.hidden_states, *gates)
        )

    return run


def _read(parameter: Tensor | None) -> Tensor | None:
    """Return a parameter where it lies: what is written to it, a recorded step reads."""
    return None if parameter is None else parameter.detach()


class _Call:
    """One call of a layer: its keys and values by branch.

    Args:
        mode: says how.
        module: what it brought to the layer.
        context: of the call.
        used: tokens up to the last query, padding included.
    """

    def __init__(
        self, mode: NativeSparse, module: SparseParts, context: AttentionContext, used: int
    ) -> None:
        self.mode, self.module, self.context, self.used = mode, module, context, used
        self.lengths: Any = {
            "cu_seqlens": context.tokens.cu_seqlens, "leftpad": context.tokens.leftpad,
        }  # fmt: skip
        memory = context.memory
        self.memory = memory if isinstance(memory, CompressedLayer) else None
        if self.memory is not None and (memory.block, memory.stride) != (mode.block, mode.stride):
            raise ValueError(
                f"`past_key_values`: holds blocks of {memory.block} tokens, one every "
                f"{memory.stride}, attention {mode.name!r} has {mode.block} and {mode.stride}"
            )
        self.positions = self._all_positions()
        self.raw = None if mode.shared_kv else module.projected("compressed", context.hidden_states)

    def window_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return keys and values [B Tk Hk D] of the window where they are not k and v."""
        if self.mode.shared_kv:
            return None, None
        keys, values = self.module.projected("window", self.context.hidden_states)
        keys = _rotated(keys.to(k.dtype), *self._angles(self.positions[:, -keys.shape[1] :]))
        return self._kept("window_keys", keys), self._kept("window_values", values.to(v.dtype))

    def compressed(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return compressed keys and values [B N Hk D], packed where sequences are."""
        raw_k, raw_v = k, v
        if self.raw is not None:
            raw_k, raw_v = (t.to(k.dtype) for t in self.raw)
            raw_k, raw_v = self._kept("raw_keys", raw_k), self._kept("raw_values", raw_v)
        memory = self.memory
        learns = torch.is_grad_enabled() and any(
            t.requires_grad for t in (raw_k, raw_v, *self.module.parameters())
        )
        if memory is None:
            return self._all_blocks(raw_k, raw_v)
        with torch.no_grad():
            self._add_blocks(memory, raw_k, raw_v)
        memory.take_in()
        if learns:  # what is in the memory has no gradient
            return self._all_blocks(raw_k, raw_v)
        count = memory.blocks(self.used)
        keys, values = (memory.more[name][:, :, :count].transpose(1, 2) for name in (KEYS, VALUES))
        return keys, values

    def _kept(self, name: str, new: Tensor) -> Tensor:
        """Return what there is of all tokens [B Tk Hk D], ``new`` [B T Hk D] behind the former."""
        T = new.shape[1]
        start = self.used - T
        if self.memory is None:
            if start:
                raise ValueError(
                    f"`past_key_values`: attention {self.mode.name!r} with keys of its own for "
                    "each branch needs the cache that the model makes"
                )
            return new
        if self.memory.taken != start:
            raise ValueError(
                f"`past_key_values`: attention {self.mode.name!r} has taken in "
                f"{self.memory.taken} of {start} tokens"
            )
        if torch.is_grad_enabled() and new.requires_grad:
            former = self.memory.more[name][:, :, :start].transpose(1, 2) if start else new[:, :0]
            new = torch.cat([former, new], dim=1)
            self.memory.room(name, new, self.used)[:, :, : self.used] = new.detach().transpose(1, 2)
            return new
        store = self.memory.room(name, new, self.used)
        store[:, :, start : self.used] = new.transpose(1, 2)
        return store[:, :, : self.used].transpose(1, 2)

    def _all_positions(self) -> Tensor:
        """Return where the rotary embedding has put each token of the text, [B or 1, used]."""
        new = self.context.positions
        assert new is not None
        if self.memory is not None:
            return self.memory.place(new)
        if not self.context.is_cached:
            return new
        # another cache tells of no positions
        if not self.context.tokens.stand_at(new):
            raise ValueError(
                f"`position_ids`: attention {self.mode.name!r} takes others than those of the "
                "columns with the cache alone that the model makes"
            )
        left, columns = self.context.tokens.leftpad, torch.arange(self.used, device=new.device)
        return columns[None] if left is None else columns - left[:, None]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [.. D] of positions as the model rotates by, in float32."""
        assert self.context.frequencies is not None
        angle = rotary_angles(positions, self.context.frequencies)
        angle = torch.cat([angle, angle], dim=-1)
        scale = self.context.rotary_scale or 1.0
        return scale * angle.cos(), scale * angle.sin()

    def _turned_back(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Undo a rotation of k [B T Hk D], and what it has scaled by."""
        size = (self.context.rotary_scale or 1.0) ** 2
        return _rotated(k, cos / size, -sin / size)

    def _all_blocks(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Compress everything at once."""
        mode, lengths = self.mode, self.lengths
        cos, sin = self._angles(self.positions)
        if self.raw is None:
            k = self._turned_back(k, cos, sin)
        sizes: Any = {"block": mode.block, "stride": mode.stride}
        first = torch.arange(0, max(k.shape[1], 1), mode.stride, device=k.device)
        if lengths["cu_seqlens"] is not None:
            B = k.shape[0]
            cos, sin = (t.expand(B, -1, -1).flatten(0, 1)[None] for t in (cos, sin))
            k, v = k.flatten(0, 1), v.flatten(0, 1)
            found = block_tokens(k.shape[0], **sizes, **lengths)
            assert found is not None
            first = found.clamp_min(0).long()
        elif lengths["leftpad"] is not None:
            last = k.shape[1] - 1
            first = (first + lengths["leftpad"][:, None]).clamp_max(last).long()
        keys, values = (
            part(x, **sizes, **lengths)
            for part, x in ((self.module.keys, k), (self.module.values, v))
        )
        count = keys.shape[-3]
        if first.ndim == 1:
            cos, sin = (t[:, first[:count]] for t in (cos, sin))
        else:
            index = first[:, :count, None].expand(-1, -1, cos.shape[-1])
            cos, sin = (t.expand(len(first), -1, -1).gather(1, index) for t in (cos, sin))
        if keys.ndim == 3:
            return _rotated(keys[None], cos, sin)[0], values
        return _rotated(keys, cos, sin), values

    def _add_blocks(self, memory: CompressedLayer, k: Tensor, v: Tensor) -> None:
        """Compress the blocks that have become whole since the memory took in tokens."""
        mode, used, left = self.mode, self.used, self.lengths["leftpad"]
        B, device = k.shape[0], k.device
        # so many in any row: how far each row is depends on its padding, at which nobody looks
        count = (used - memory.taken) // mode.stride + 1
        if left is None:
            done = memory.blocks(memory.taken)
            count = memory.blocks(used) - done
            before = torch.full((B,), done, device=device)
        else:
            before = (memory.taken - left - mode.block + mode.stride).clamp_min(0) // mode.stride
        places = memory.blocks(used) + count + 1
        stores = [memory.room(name, t, places) for name, t in ((KEYS, k), (VALUES, v))]
        if count <= 0 or used < mode.block:
            return
        n = before[:, None] + torch.arange(count, device=device)  # [B count]
        start = n * mode.stride + (0 if left is None else left[:, None])
        # those that are not whole yet get what will be written over
        start = start.clamp_max(used - mode.block).long()
        index = (start[..., None] + torch.arange(mode.block, device=device)).flatten(1)
        rows = torch.arange(B, device=device)[:, None]
        positions = self.positions.expand(B, -1)
        sizes = {"block": mode.block, "stride": mode.block}
        tokens = k[rows, index]
        if self.raw is None:
            cos, sin = self._angles(positions.gather(1, index))
            tokens = self._turned_back(tokens, cos, sin)
        keys = self.module.keys(tokens, **sizes)
        keys = _rotated(keys, *self._angles(positions.gather(1, start)))
        values = self.module.values(v[rows, index], **sizes)
        for store, new in zip(stores, (keys, values)):
            store.transpose(1, 2)[rows, n.long()] = new.to(store.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B T Hk D] by [B or 1, T, D]."""
    return apply_rotary(x.contiguous(), cos.to(x.dtype), sin.to(x.dtype))
