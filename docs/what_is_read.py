"""Draw which keys a query reads in each attention mode, as the modes really read them.

The embedded recall model reads a text with a question at its end. For each mode the values of one
layer are replaced by rows of the unit matrix, so that each entry of the output is the weight of one
key: what is not zero was read.

    python docs/what_is_read.py docs/what-is-read.png
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AttentionInterface, AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.attention import hub
from bitnet_triton.attention.modes import native_sparse
from bitnet_triton.training.tasks import TASKS, TextTokens, build
from bitnet_triton.training.tasks.words import Names

T, PROMPT, LAYER, HEAD = 256, 96, 2, 0
SPARSE = {
    "mode": "native_sparse", "block": 16, "stride": 8, "selection": 16, "selected": 5,
    "initial": 1, "local": 2, "window": 24,
}  # fmt: skip
MODES: dict[str, tuple[Any, str]] = {
    "full": ("full", "every key"),
    "sliding": ({"mode": "sliding", "window": 64}, "the 64 latest"),
    "pooled_blocks": (
        {"mode": "pooled_blocks", "block": 16, "selected": 4, "window": 4, "stride": 2},
        "4 blocks of 16, by means of keys",
    ),
    "indexed_blocks": (
        {"mode": "indexed_blocks", "block": 16, "selected": 4},
        "4 blocks of 16, untrained index",
    ),
    "quest": ({"mode": "quest", "page": 8, "budget": 64}, "8 pages of 8, by bounds"),
    "lsh_sampling": (
        {"mode": "lsh_sampling", "bits": 5, "tables": 24, "recent": 16},
        "a sample, after the prompt",
    ),
    "verified_sampling": (
        {
            "mode": "verified_sampling", "page": 8, "selected": 4, "local": 2, "base": 16,
            "epsilon": 0.5, "delta": 0.4,
        },
        "pages and a sample, after the prompt",
    ),
}  # fmt: skip
UNREAD, READ, MORE, FUTURE = "#e8e3d6", "#1f4e79", "#d9822b", "#ffffff"


def text() -> Tensor:
    """Return ids, some T of them, of a text that ends with a question about a note in it."""
    rng = random.Random("what is read")
    tokens = TextTokens(AutoTokenizer.from_pretrained(bt.RECALL_MODEL))
    prompt = build([TASKS["needles"].draw(rng, Names(rng), T // 2)], tokens, T, rng)
    return torch.tensor([prompt.context + prompt.turns[0].question])


def weights(run: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Return what ``run`` weighs each of the rows v [1 N Hk D] with, [Tq N], in one head."""
    N, D = v.shape[1], v.shape[-1]
    parts = []
    for start in range(0, N, D):
        probe = torch.zeros_like(v)
        size = min(D, N - start)
        probe[:, start : start + size] = torch.eye(D)[:size, None]
        parts.append(run(probe)[0, :, HEAD, :size])
    return torch.cat(parts, 1)


def look(ids: Tensor, mode: Any) -> dict[str, Tensor]:
    """Return the weights [T T] of one layer: "all", or those of each branch of native_sparse."""
    model = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, fuse=False)
    bt.set_attention(model, mode)
    found: dict[str, Tensor] = {}
    attend, sparse = hub.attend, native_sparse.native_sparse_attention

    def watched(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any
    ) -> Any:
        if module.layer_idx == LAYER and mode is not SPARSE:

            def run(v: Tensor) -> Tensor:
                return attend(module, query, key, v.transpose(1, 2), *args, **more)[0]

            found["all"] = weights(run, value.transpose(1, 2))
        return attend(module, query, key, value, *args, **more)

    def branches(
        q: Tensor, k: Tensor, v: Tensor, kc: Tensor, vc: Tensor, gates: Tensor, **more: Any
    ) -> Tensor:
        if len(entered) == LAYER:
            for place, name in enumerate(("compressed", "chosen", "window")):
                only = torch.zeros_like(gates)
                only[..., place] = 1

                def run(x: Tensor, name: str = name, only: Tensor = only) -> Tensor:
                    values = (v, x) if name == "compressed" else (x, vc)
                    return sparse(q, k, values[0], kc, values[1], only, **more)

                found[name] = weights(run, vc if name == "compressed" else v)
        entered.append(None)
        return sparse(q, k, v, kc, vc, gates, **more)

    entered: list[None] = []
    AttentionInterface.register(hub.NAME, watched)
    native_sparse.native_sparse_attention = branches
    try:
        model(ids, use_cache=False, prompt_len=PROMPT)
    finally:
        AttentionInterface.register(hub.NAME, attend)
        native_sparse.native_sparse_attention = sparse
    return found


def picture(ids: Tensor) -> Figure:
    """Draw a panel for each mode, and one for each branch of native_sparse."""
    panels: list[tuple[str, str, Tensor]] = []
    for name, (mode, what) in MODES.items():
        panels.append((name, what, look(ids, mode)["all"] > 0))
    sparse, stride, size = look(ids, SPARSE), SPARSE["stride"], SPARSE["block"]
    blocks = sparse["compressed"] > 0
    tokens = torch.zeros_like(sparse["chosen"], dtype=torch.bool)
    for n in range(blocks.shape[1]):
        tokens[:, n * stride : n * stride + size] |= blocks[:, n : n + 1]
    own = [
        ("native_sparse: compressed", "whole blocks, one key for each", tokens),
        ("native_sparse: chosen", "5 blocks of 16, by the compressed", sparse["chosen"] > 0),
        ("native_sparse: window", "the 24 latest", sparse["window"] > 0),
    ]
    panels[2:2] = own
    figure = Figure(figsize=(14, 6.5), facecolor="white")
    axes = figure.subplots(2, 5).flat
    for axis, (name, what, read) in zip(axes, panels):
        compressed = "compressed" in name
        colors = ListedColormap([UNREAD, MORE if compressed else READ, FUTURE])
        future = torch.ones_like(read, dtype=torch.int).triu(1)
        axis.imshow(read + 2 * future, cmap=colors, vmin=0, vmax=2, interpolation="nearest")
        last = int(blocks[-1].sum()) if compressed else int(read[-1].sum())
        axis.set_title(name, fontsize=11, fontweight="bold", loc="left", pad=19)
        axis.text(0, 1.02, what, transform=axis.transAxes, fontsize=9, color="#555555")
        axis.text(
            0.97, 0.95, f"the last query\nreads {last}", transform=axis.transAxes, fontsize=9,
            ha="right", va="top", color="#333333",
        )  # fmt: skip
        axis.set_xticks([0, T // 2, T], ["0", str(T // 2), str(T)], fontsize=8)
        axis.set_yticks([0, T // 2, T], ["0", str(T // 2), str(T)], fontsize=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.tick_params(length=0, colors="#777777")
    figure.supxlabel("key", fontsize=10)
    figure.supylabel("query", fontsize=10)
    figure.tight_layout(w_pad=1.2, h_pad=1.2)
    return figure


def main() -> None:
    """Write the picture where the command line says."""
    torch.manual_seed(0)
    with torch.no_grad():
        picture(text()).savefig(sys.argv[1], dpi=90, bbox_inches="tight")


if __name__ == "__main__":
    main()
