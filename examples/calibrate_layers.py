"""Which layers have to stay full: a deeper recall model, and plans that spare windows differently.

``train_recall.py`` with eight layers. The head start gives recall's heads to layers that the seed
draws, so that no rule like "every second layer" fits by design. ``compare`` calibrates the model,
and measures the calibrated plans beside those by rule with as many full layers.

    python examples/calibrate_layers.py train --output runs/deep --preset deep
    python examples/calibrate_layers.py compare runs/deep --output runs/deep-plans
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch import nn

import bitnet_triton as bt

sys.path.insert(0, str(Path(__file__).parent))
import train_recall as recipe

recipe.PRESETS["deep"] = recipe.Preset(
    hidden=256, intermediate=512, layers=8, heads=4, row=1024, rate=2e-4, start=512, context=1024,
)  # fmt: skip
_start_in_order = recipe.head_start


def head_start(model: bt.BitNetForCausalLM) -> None:
    """Give the heads of the head start to layers behind the first that the seed draws."""
    layers = model.model.layers
    behind = list(range(1, len(layers)))
    random.Random(f"layers:{torch.initial_seed()}").shuffle(behind)
    model.model.layers = nn.ModuleList([layers[i] for i in [0, *behind]])
    _start_in_order(model)
    model.model.layers = layers


recipe.head_start = head_start

if __name__ == "__main__":
    recipe.app()
