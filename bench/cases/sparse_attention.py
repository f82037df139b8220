"""Attention that reads chosen keys beside attention that reads all: by length, with its bound.

A choice is that of Native Sparse Attention: the first block, the own and the one before, and others
at random; a trained choice clusters more and is never slower. Each provider is checked against its
own formula in float64, on a sample of queries: outputs, and the gradient of the queries.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, PeerMissingError, Point, Provider, Settings, Work
from bench.cases import flex_blocks
from bitnet_triton.kernels import (
    SparseBlocks,
    Units,
    compress_blocks,
    flash_attention,
    native_sparse_attention,
    pool_keys,
    selected_block_attention,
    top_blocks,
)

BLOCKS = SparseBlocks()
INDEX_BLOCK = 128  # tokens of a block that an index chooses
PAGE, PAGES = 16, 64
_TOLERANCE = 8e-3
_SAMPLE = 32
_PASSES = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5, "decode": 1.0}
# longer ones take FlexAttention minutes to compile and run
_MOST_FLEX = 32768
_BY_HEAD = 2**26
_STEPS = 32
_FAR_BYTES = 2**28  # more than the last cache of a processor holds

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Inputs:
    """One point: q [1 Tq H D]; k, v [1 T Hk D]; gates [1 Tq H 3]; dout; indices [1 Tq Hk S]."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    dout: Tensor
    indices: Tensor
    passes: str

    @property
    def rows(self) -> Tensor:
        """The queries that are checked, the last one among them."""
        Tq = self.q.shape[1]
        return torch.linspace(0, Tq - 1, min(_SAMPLE, Tq), device=self.q.device).long()

    @property
    def positions(self) -> Tensor:
        """Where these stand among the keys."""
        return self.rows + self.k.shape[1] - self.q.shape[1]

    def checked(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what is compared."""
        return {name: results[name][0, self.rows] for name in ("out", "dq") if name in results}


def make_inputs(passes: str, T: int, H: int, Hk: int, D: int, settings: Settings) -> Inputs:
    """Draw everything from normal distributions, and choose blocks."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=settings.device).to(settings.dtype)

    random, Tq = settings.generator, 1 if passes == "decode" else T
    q, k, v, dout = randn(1, Tq, H, D), randn(1, T, Hk, D), randn(1, T, Hk, D), randn(1, Tq, H, D)
    gates = randn(1, Tq, H, 3).sigmoid()
    indices = torch.stack([_choose(Tq, T, random, settings.device) for _ in range(Hk)], 1)[None]
    return Inputs(q, k, v, gates, dout, indices, passes)


def _choose(Tq: int, T: int, random: torch.Generator, device: torch.device) -> Tensor:
    """Return int32 [Tq S]: the forced blocks, and others at random."""
    own = (torch.arange(T - Tq, T, device=device) // BLOCKS.selection)[:, None]
    number = torch.arange(int(own.max()) + 1, device=device)
    chosen = []
    # a part of the queries at a time: they meet all blocks
    for part in own.split(max(1, _BY_HEAD // len(number))):
        score = torch.rand(len(part), len(number), generator=random, device=device)
        forced = (number < BLOCKS.initial) | (number > part - BLOCKS.local)
        score = score.masked_fill(forced, 2.0).masked_fill(number > part, -1.0)
        top, at = score.topk(min(BLOCKS.selected, len(number)), -1)
        chosen.append(torch.where(top < 0, -1, at).to(torch.int32))
    return torch.cat(chosen)


def _work(
    attend: Attend, inputs: Inputs, leaves: Sequence[Tensor], expected: Attend, keys: float
) -> Work:
    """Return the work of one provider, whose queries read so many keys on average."""
    leaves = [t.detach().requires_grad_("backward" in inputs.passes) for t in leaves]
    names = ["dq", *(f"d{i}" for i in range(1, len(leaves)))]

    def gradients(out: Tensor, **options: Any) -> dict[str, Tensor]:
        return dict(zip(names, torch.autograd.grad(out, leaves, inputs.dout, **options)))

    def call() -> dict[str, Tensor]:
        out = attend(*leaves)
        if not out.requires_grad:
            return {"out": out}
        return {"out": out.detach(), **gradients(out)}

    run = call
    if inputs.passes == "backward":
        with torch.enable_grad():
            kept = attend(*leaves)
        run = functools.partial(gradients, kept, retain_graph=True)
    (_, Tq, H, D), T = inputs.q.shape, inputs.k.shape[1]
    factor = _PASSES[inputs.passes]
    read = keys * Tq if Tq == 1 else T
    moved = (2 * inputs.q.nbytes + 2 * inputs.k[:, :1].nbytes * read) * (1 if factor == 1 else 3)
    dense = T if Tq == 1 else (T + 1) / 2
    return Work(
        run, lambda: inputs.checked(run()), lambda: _reference(expected, inputs),
        read_bytes=int(moved), units=Tq, grad=factor > 1,
        details={"flops": 4 * keys * Tq * D * H * factor, "at_most": {"dense": dense / keys}},
    )  # fmt: skip


def _dense_keys(inputs: Inputs) -> float:
    T = inputs.k.shape[1]
    return T if inputs.q.shape[1] == 1 else (T + 1) / 2


def _read_keys(inputs: Inputs, most: int) -> float:
    """Return how many of up to ``most`` keys a query reads on average."""
    (Tq, T), most = (inputs.q.shape[1], inputs.k.shape[1]), min(most, inputs.k.shape[1])
    return most if Tq == 1 else (most * (most + 1) / 2 + (T - most) * most) / T


def _dense(inputs: Inputs) -> Work:
    leaves = (inputs.q, inputs.k, inputs.v)
    return _work(flash_attention, inputs, leaves, _dense_formula, _dense_keys(inputs))


def _sdpa(inputs: Inputs) -> Work:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        # PyTorch aligns is_causal to the top left: one query would see one key
        causal = q.shape[2] > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    leaves = (inputs.q, inputs.k, inputs.v)
    return _work(attend, inputs, leaves, _dense_formula, _dense_keys(inputs))


def _flex(inputs: Inputs) -> Work:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    Tq, T = inputs.q.shape[1], inputs.k.shape[1]
    if "backward" in inputs.passes and inputs.q.device.type == "cpu":
        raise PeerMissingError("FlexAttention has no backward on a CPU")
    if Tq > _MOST_FLEX:
        raise PeerMissingError(f"not asked for more than {_MOST_FLEX} tokens")
    torch._dynamo.reset()

    def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + (T - Tq) >= j

    # uncompiled, it would make the whole matrix
    make_mask = torch.compile(create_block_mask)
    mask = make_mask(visible, None, None, Tq, T, device=inputs.q.device)
    compiled = torch.compile(flex_attention, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    leaves = (inputs.q, inputs.k, inputs.v)
    return _work(attend, inputs, leaves, _dense_formula, _dense_keys(inputs))


def _flex_blocks(inputs: Inputs) -> Work:
    """Return the work of FlexAttention over the blocks of `selected`, by the keys that it needs."""
    flex_blocks.check(inputs.q, backward="backward" in inputs.passes, most=_MOST_FLEX)
    T, H = inputs.k.shape[1], inputs.q.shape[2]
    mask = flex_blocks.make_block_mask(inputs.indices, T, H, block=BLOCKS.selection)
    keys = _read_keys(inputs, BLOCKS.selected * BLOCKS.selection)
    formula = functools.partial(_selected_formula, indices=inputs.indices)
    leaves = (inputs.q, inputs.k, inputs.v)
    work = _work(flex_blocks.make_attend(mask), inputs, leaves, formula, keys)
    return replace(work, details={**work.details, "share_read": flex_blocks.share_read(mask)})


def _selected(inputs: Inputs) -> Work:
    choices = itertools.cycle([inputs.indices])
    if inputs.passes == "decode":
        # each step has blocks of its own to read, beside which the last ones leave the caches
        T, (Hk, S) = inputs.k.shape[1], inputs.indices.shape[2:]
        random, size = torch.Generator().manual_seed(0), (_STEPS - 1, 1, 1, Hk, S)
        others = torch.randint(T // BLOCKS.selection, size, generator=random).to(inputs.k.device)
        choices = itertools.cycle([inputs.indices, *others.to(torch.int32)])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return selected_block_attention(q, k, v, next(choices), block=BLOCKS.selection)

    keys = _read_keys(inputs, BLOCKS.selected * BLOCKS.selection)
    formula = functools.partial(_selected_formula, indices=inputs.indices)
    return _work(attend, inputs, (inputs.q, inputs.k, inputs.v), formula, keys)


def _native_sparse(inputs: Inputs) -> Work:
    def compressed(*tensors: Tensor) -> list[Tensor]:
        return [compress_blocks(t, block=BLOCKS.block, stride=BLOCKS.stride) for t in tensors]

    kept = compressed(inputs.k, inputs.v)
    decodes = inputs.passes == "decode"

    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, **options: Any) -> Any:
        # a step of decoding compresses one block in sixteen tokens: its memory keeps the others
        pair = kept if decodes else compressed(k, v)
        return native_sparse_attention(q, k, v, *pair, gates, blocks=BLOCKS, **options)

    leaves = (inputs.q, inputs.k, inputs.v, inputs.gates)
    with torch.no_grad():
        indices = attend(*leaves, return_indices=True)[1]
    # half of the compressed keys on average, and their scores once more for the choice
    units = BLOCKS.compressed(inputs.k.shape[1]) * (1 if decodes else 0.75)
    keys = units + _read_keys(inputs, BLOCKS.selected * BLOCKS.selection)
    keys += _read_keys(inputs, BLOCKS.window)
    formula = functools.partial(_native_sparse_formula, pair=kept, indices=indices)
    return _work(attend, inputs, leaves, formula, keys)


def _chosen(
    inputs: Inputs, choose: Callable[[Tensor, Tensor], Tensor], queries: list[Tensor],
    keys: Tensor, block: int, units: float, selected: int,
) -> Work:  # fmt: skip
    """Return the work of a choice and of attention to what it chooses.

    Args:
        inputs: the point.
        choose: maps queries of the choice, and keys of it, to blocks [1 Tq Hk S].
        queries: those of the choice; each call takes the next ones, as each step of decoding would.
        keys: those of the choice; steps of decoding have copies, which together leave the caches of
            a processor, as those of other layers would.
        block: tokens of a block.
        units: keys and values that the choice costs as much as, for a query.
        selected: blocks that a query reads.
    """
    if "backward" in inputs.passes:
        raise PeerMissingError("the choice has no gradient; behind it stands that of `selected`")
    indices = choose(queries[0], keys)
    wanted = min(selected, -(-inputs.k.shape[1] // block))
    if int((indices[0, -1] >= 0).sum(-1).min()) != wanted:
        raise ValueError(f"`indices`: expected {wanted} blocks for the last query, got fewer")
    copies = [keys]
    if inputs.passes == "decode":
        count = min(_STEPS, -(-_FAR_BYTES // keys.nbytes))
        copies += [keys.clone() for _ in range(count - 1)]
    asked, held = itertools.cycle(queries), itertools.cycle(copies)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen = choose(next(asked), next(held))
        return selected_block_attention(q, k, v, chosen, block=block)

    read = units + _read_keys(inputs, selected * block)
    formula = functools.partial(_selected_formula, indices=indices, block=block)
    return _work(attend, inputs, (inputs.q, inputs.k, inputs.v), formula, read)


def _drawn(inputs: Inputs, heads: int) -> list[Tensor]:
    """Return queries [1 Tq heads D] of a choice: one tensor, or one for each of some steps."""
    random = torch.Generator(inputs.q.device).manual_seed(1)
    Tq, D = inputs.q.shape[1], inputs.q.shape[-1]
    count = _STEPS if inputs.passes == "decode" else 1
    shape = (1, Tq, heads, D)
    draws = [torch.randn(shape, generator=random, device=inputs.q.device) for _ in range(count)]
    return [draw.to(inputs.q.dtype) for draw in draws]


def _indexed(inputs: Inputs, *, codes: bool) -> Work:
    """The blocks with the token whose index key a query of its own likes best (MSA)."""
    (T, Hk), H = inputs.k.shape[1:3], inputs.q.shape[2]
    queries, keys, scale = _drawn(inputs, Hk), inputs.v[:, :, :1].contiguous(), None
    if codes:
        scale = keys.float().abs().amax(-1) / 127
        keys = (keys.float() / scale[..., None]).round().to(torch.int8)

    def choose(index: Tensor, keys: Tensor) -> Tensor:
        return top_blocks(
            index, keys, scale=scale, block=INDEX_BLOCK, selected=BLOCKS.selected, initial=0,
            tokens=inputs.k.shape[1],
        )  # fmt: skip

    if inputs.passes == "decode":  # bytes of one index key beside those of all keys and values
        units = T * keys.element_size() / (2 * Hk * inputs.k.element_size())
    else:  # products of Hk index queries beside two products of H heads
        units = (T + 1) / 2 * Hk / (2 * H)
    return _chosen(inputs, choose, queries, keys, INDEX_BLOCK, units, BLOCKS.selected)


def _pooled(inputs: Inputs) -> Work:
    """The blocks whose mean keys the queries of a group like best (InfLLM-v2, MoBA)."""
    return _by_units(inputs, Units("mean", BLOCKS.selection, BLOCKS.selection), BLOCKS.selected)


def _quest(inputs: Inputs) -> Work:
    """The pages in which a query could like a key best, by bounds of their channels."""
    return _by_units(inputs, Units("bounds", PAGE, PAGE), PAGES)


def _by_units(inputs: Inputs, units: Units, selected: int) -> Work:
    Hk = inputs.k.shape[2]
    kept, decodes = pool_keys(inputs.k, units=units), inputs.passes == "decode"

    def choose(q: Tensor, keys: Tensor) -> Tensor:
        keys = keys if decodes else pool_keys(inputs.k, units=units)
        return top_blocks(
            q, keys, units=units, block=units.window, selected=selected, sets=Hk,
            tokens=inputs.k.shape[1],
        )  # fmt: skip

    # bounds are as wide as a key and a value, means half as wide
    share = (1.0 if units.kind == "bounds" else 0.5) / units.stride
    cost = share * _dense_keys(inputs)
    queries = _drawn(inputs, inputs.q.shape[2])
    return _chosen(inputs, choose, queries, kept, units.window, cost, selected)


def _fla(_inputs: Inputs) -> Work:
    raise PeerMissingError(
        "its kernels run on GPUs alone, with a power of two of at least 16 heads a key head, and "
        "its window needs flash-attn"
    )


def _attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Attend with q [R H D] in float64; hidden [R Hk N]; a row without a key gives zeros."""
    group, heads = q.shape[1] // k.shape[1], []
    for head in range(q.shape[1]):
        one = head // group
        scores = q[:, head] @ k[:, one].double().t() * q.shape[-1] ** -0.5
        off = hidden[:, one % hidden.shape[1]]
        weights = scores.masked_fill(off, -1e30).softmax(-1).masked_fill(off, 0.0)
        heads.append(weights @ v[:, one].double())
    return torch.stack(heads, 1)


def _behind(inputs: Inputs) -> Tensor:
    """Return which keys [R T] stand behind the queries that are checked."""
    j = torch.arange(inputs.k.shape[1], device=inputs.k.device)
    return j > inputs.positions[:, None]


def _dense_formula(inputs: Inputs, q: Tensor) -> Tensor:
    return _attention(q, inputs.k[0], inputs.v[0], _behind(inputs)[:, None])


def _selected_formula(
    inputs: Inputs, q: Tensor, *, indices: Tensor, block: int = BLOCKS.selection
) -> Tensor:
    T = inputs.k.shape[1]
    blocks = -(-T // block)
    chosen = indices[0, inputs.rows].long()
    shown = torch.zeros(*chosen.shape[:2], blocks + 1, dtype=torch.bool, device=q.device)
    shown.scatter_(-1, torch.where(chosen < 0, blocks, chosen), True)
    hidden = ~shown[..., :blocks].repeat_interleave(block, -1)[..., :T]
    return _attention(q, inputs.k[0], inputs.v[0], hidden | _behind(inputs)[:, None])


def _native_sparse_formula(
    inputs: Inputs, q: Tensor, *, pair: list[Tensor], indices: Tensor
) -> Tensor:
    k, v = (t[0] for t in pair)
    last = torch.arange(len(k), device=q.device) * BLOCKS.stride + BLOCKS.block - 1
    whole = _attention(q, k, v, (last > inputs.positions[:, None])[:, None])
    chosen = _selected_formula(inputs, q, indices=indices)
    j = torch.arange(inputs.k.shape[1], device=q.device)
    outside = _behind(inputs) | (j <= inputs.positions[:, None] - BLOCKS.window)
    near = _attention(q, inputs.k[0], inputs.v[0], outside[:, None])
    gates = inputs.gates[0, inputs.rows].double()
    return torch.einsum("rhdc,rhc->rhd", torch.stack([whole, chosen, near], -1), gates)


def _reference(formula: Attend, inputs: Inputs) -> dict[str, Tensor]:
    """Return the outputs and the gradients of a sample of queries, in float64."""
    backward = "backward" in inputs.passes
    q = inputs.q[0, inputs.rows].double().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        out = formula(inputs, q)
    found = {} if inputs.passes == "backward" else {"out": out.detach()}
    if backward:
        dout = inputs.dout[0, inputs.rows].double()
        found["dq"] = torch.autograd.grad(out, q, dout)[0]
    return found


def _flops(passes: str, T: int, H: int, Hk: int, D: int) -> float:
    """Count those of dense attention; each provider says its own."""
    return 4 * (T if passes == "decode" else T * (T + 1) / 2) * D * H * _PASSES[passes]


def _grid() -> list[Point]:
    # the attention of the published 2B model
    heads = {"H": 20, "Hk": 5, "D": 128}
    lengths = (4096, 8192, 16384, 32768, 65536, 131072)
    return [
        {"passes": p, "T": T, **heads} for p in ("forward", "backward", "decode") for T in lengths
    ]


def case() -> Case:
    """Return the case."""
    return Case(
        name="sparse_attention",
        title="Sparse attention beside dense",
        grid=_grid(),
        inputs=make_inputs,
        reference=lambda inputs: {},  # each provider has its own
        providers={
            "native_sparse": Provider(
                "native_sparse_attention", _native_sparse, _TOLERANCE,
                note="whole: compression, its attention, choice, chosen blocks, window, gates; in "
                "decoding the same query again, what it reads stays in a cache that has room",
            ),
            "selected": Provider(
                "selected_block_attention", _selected, _TOLERANCE,
                note=f"{BLOCKS.selected} blocks of {BLOCKS.selection} that are given, each step of "
                "decoding others",
            ),
            "indexed": Provider(
                "indexed_blocks", functools.partial(_indexed, codes=False), _TOLERANCE,
                note=f"one index key a token, {BLOCKS.selected} blocks of {INDEX_BLOCK} tokens; "
                "without the projections of the index",
            ),
            "indexed_int8": Provider(
                "indexed_blocks, int8", functools.partial(_indexed, codes=True), _TOLERANCE,
                note="the same with index keys of 8 bits, made before",
            ),
            "pooled": Provider(
                "pooled_blocks", _pooled, _TOLERANCE,
                note=f"{BLOCKS.selected} blocks of {BLOCKS.selection} by their mean keys",
            ),
            "quest": Provider(
                "quest", _quest, _TOLERANCE,
                note=f"{PAGES} pages of {PAGE} tokens by bounds of their keys",
            ),
            "dense": Provider("flash_attention", _dense, _TOLERANCE, note="dense, causal"),
            "sdpa": Provider("torch SDPA", _sdpa, _TOLERANCE, note="dense, causal"),
            "flex": Provider(
                "torch FlexAttention", _flex, _TOLERANCE, note="dense, causal; torch.compile"
            ),
            "flex_blocks": Provider(
                "torch FlexAttention, blocks", _flex_blocks, _TOLERANCE,
                note=f"the blocks of `selected`, by a BlockMask of tiles of {flex_blocks.TILE} "
                "queries, made before",
            ),
            "fla": Provider("fla NSA", _fla, _TOLERANCE),
        },
        baselines=("dense", "sdpa"),
        flops=_flops,
        unit="tokens",
        panels=(("H", "Hk", "D"), ("passes",)),
        curve="T",
    )  # fmt: skip
