"""Name the checkpoints of 1bitLLM: they look like a dense Llama, and are none.

They say ``model_type: llama`` and ``weight_bits: 1``, have no ``quantization_config``, and hold
norms behind attention and the gate that transformers' Llama has no place for. Loaded as a Llama
they lose both the norms and the quantisers, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# a dense Llama holds no norm below its attention, its MLP or a linear
_PARTS = (".self_attn.", ".mlp.")
_NORMS = ("norm.weight", "_ln.weight")
_INSTEAD = (
    "it would be loaded as a dense Llama, which leaves out the norms inside its layers and rounds "
    "nothing; no model here has this layout. What can be loaded: checkpoints with `quant_method: "
    "bitnet`, as microsoft/bitnet-b1.58-2B-4T and HF1BitLLM/Llama3-8B-1.58-100B-tokens"
)


def config_objection(config: Mapping[str, Any] | Any) -> str | None:
    """Say why a Llama of this config is none; None for any other config.

    Args:
        config: a config of transformers, or the plain data of a ``config.json``.
    """
    get = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    bits = get("weight_bits")
    is_few = isinstance(bits, (int, float)) and bits <= 2
    if get("model_type") != "llama" or not is_few or get("quantization_config"):
        return None
    return (
        f"`weight_bits: {bits}` without `quantization_config` marks a ternary checkpoint of "
        f"1bitLLM: {_INSTEAD}"
    )


def tensors_objection(files: Sequence[str | Path]) -> str | None:
    """Say why ``files`` hold no dense Llama; None where they may. Reads the names alone."""
    for file in map(Path, files):
        for name in _names(file):
            if any(part in name for part in _PARTS) and name.endswith(_NORMS):
                return f"{name} is a norm inside a layer, as in ternary checkpoints: {_INSTEAD}"
    return None


def _names(file: Path) -> list[str]:
    """Return the names of the tensors; none of a file that is for transformers to refuse."""
    if file.suffix != ".safetensors":
        return []
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError):
        return []
