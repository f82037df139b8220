"""Train hybrids of linear and full attention from scratch, beside twins with full attention.

Texts, steps and comparison are those of ``train_nsa.py`` beside this file, models have a layer
more. ``hybrid`` has full attention in one layer of four, the second, which the head start gives
the heads that look for earlier occurrences; ``linear`` has it in none.

    python examples/train_hybrid.py train --output runs/hybrid --attention hybrid
    python examples/train_hybrid.py train --output runs/linear --attention linear
    python examples/train_hybrid.py train --output runs/dense --attention full
    python examples/train_hybrid.py compare runs/dense runs/hybrid runs/linear
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import bitnet_triton as bt

sys.path.insert(0, str(Path(__file__).parent))
import train_nsa as twins

LINEAR = {"mode": "linear"}
_HYBRID = [LINEAR, {"mode": "full"}, LINEAR, LINEAR]


@torch.no_grad()
def begin(model: bt.BitNetForCausalLM) -> None:
    """Let the first layer see the token before by its convolution, where the twins rotate.

    Two heads of the head start look at the token before by an angle. Here they forget at once what
    was written, and write the values of the token before.
    """
    first = model.model.layers[0].self_attn
    H, D, part = model.config.num_attention_heads, first.head_dim, first.linear
    for head in (0, 1):  # one key head for each query head
        channels = slice(head * D, (head + 1) * D)
        first.k_proj.weight[channels] = first.q_proj.weight[channels]
        part.gates.decay_bias[head] = 6.0
        values = part.convolution.weight[2 * H * D :][channels]
        values[:, -2:] = torch.tensor([1.0, 0.0])


twins.SIZES = replace(twins.SIZES, layers=len(_HYBRID))
twins.ATTENTION |= {
    "hybrid": {"prefill": _HYBRID, "decode": _HYBRID},
    "linear": LINEAR,
}
twins.STARTS |= {"hybrid": begin, "linear": begin}

if __name__ == "__main__":
    twins.app()
