"""Ternary (BitNet b1.58) language models, fast at long context, on GPU and CPU.

Public names are imported on first use: ``import bitnet_triton`` alone imports neither transformers
nor triton.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BackendUnavailableError": "bitnet_triton.errors",
    "BitNetConfig": "bitnet_triton.models",
    "BitNetForCausalLM": "bitnet_triton.models",
    "BitNetModel": "bitnet_triton.models",
    "CheckpointError": "bitnet_triton.errors",
    "Mask": "bitnet_triton.kernels",
    "RECALL_MODEL": "bitnet_triton.assets",
    "TINY_MODEL": "bitnet_triton.assets",
    "PrefixCache": "bitnet_triton.models",
    "add_global_projections": "bitnet_triton.models",
    "disable": "bitnet_triton.models",
    "enable": "bitnet_triton.models",
    "evaluate": "bitnet_triton.training",
    "extend_context": "bitnet_triton.models",
    "fuse": "bitnet_triton.models",
    "Memory": "bitnet_triton.cache",
    "MemoryKind": "bitnet_triton.cache",
    "Mode": "bitnet_triton.attention",
    "OutOfPagesError": "bitnet_triton.errors",
    "load_cache": "bitnet_triton.models",
    "merge_adapters": "bitnet_triton.models",
    "quantize_head": "bitnet_triton.nn",
    "register_memory": "bitnet_triton.cache",
    "register_mode": "bitnet_triton.attention",
    "save_cache": "bitnet_triton.models",
    "set_attention": "bitnet_triton.models",
    "set_cache": "bitnet_triton.models",
    "unfuse": "bitnet_triton.models",
    "unquantize_head": "bitnet_triton.nn",
    "use_backend": "bitnet_triton.runtime",
    "use_ternary_kernels": "bitnet_triton.models",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
