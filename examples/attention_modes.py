"""Run one model with several attention modes: who sees what, what the cache holds, what it writes.

python examples/attention_modes.py
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.cache_utils import Cache

import bitnet_triton as bt
from bitnet_triton.attention.masked import MaskMode

PROMPT = "import os\n\n\ndef read_lines(path):\n    lines = []\n    with open(path) as file:\n"
MODES: dict[str, Any] = {
    "full attention": "full",
    "a window of 16 and 2 sinks": {"mode": "sliding", "window": 16, "sinks": 2},
    "the same, as an endless stream": {"mode": "streaming", "window": 16, "sinks": 2},
    "windows for the prompt, every other layer full": {
        "preset": "swaa-untrained",
        "window": 16,
        "sinks": 2,
    },
}


def kilobytes(cache: Cache) -> float:
    """Return how much memory keys and values take."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.untyped_storage().nbytes() for t in tensors) / 1024


def main() -> None:
    """Write with each mode, and say what its cache holds."""
    tokenizer = AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for title, attention in MODES.items():
        model = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, attention=attention).eval()
        mode = model.attention_plan.mode(0, "prefill")
        print(f"\n== {title}")
        if isinstance(mode, MaskMode):
            print(mode.mask.explain(24, width=24))
        with torch.inference_mode():
            output = model.generate(
                ids, max_new_tokens=100, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True,
            )  # fmt: skip
        new = tokenizer.decode(output.sequences[0, ids.shape[1] :])
        print(f"cache: {kilobytes(output.past_key_values):.0f} KB; it goes on: {new[:60]!r}")


if __name__ == "__main__":
    main()
