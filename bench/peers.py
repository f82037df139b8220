"""Other libraries: found, or skipped by name with the reason."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.case import PeerMissingError


@dataclass(frozen=True)
class Peer:
    """A library to compare with.

    Attributes:
        name: what people call it.
        modules: what is imported; empty for one that has no Python module.
        compared_in: what runs it in each case; empty when no case does.
        reason: why none does.
        distribution: that brings the first module and has the version; "" for one of its name.
        install: what brings it here; "" for one that bitnet_triton needs anyway.
    """

    name: str
    modules: tuple[str, ...] = ()
    compared_in: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    distribution: str = ""
    install: str = ""

    def missing(self) -> str | None:
        """Say which module is not installed, and what brings it; None where all are there."""
        absent = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if not absent:
            return None
        how = f"; {self.install}" if self.install else ""
        return f"{' and '.join(absent)}: not installed{how}"

    def state(self) -> str:
        """Return the version and what is compared, or why the library is skipped."""
        if not self.modules:
            return f"skipped: {self.reason}"
        missing = self.missing()
        if missing:
            return f"skipped: {missing}"
        version = importlib.metadata.version(self.distribution or self.modules[0])
        if not self.compared_in:
            return f"skipped: {version} is installed, but {self.reason}"
        compared = "; ".join(f"{case} ({what})" for case, what in self.compared_in.items())
        return f"{version}, compared in {compared}"

    def need(self) -> None:
        """Raise with the reason where the library is missing.

        Raises:
            PeerMissingError: it is not installed.
        """
        missing = self.missing()
        if missing:
            raise PeerMissingError(missing)


TORCH = Peer(
    "torch",
    ("torch",),
    {
        "ternary_linear": "F.linear on unpacked weights, _int_mm",
        "small_batches": "F.linear on unpacked weights",
        "bit_linear": "F.linear on quantised weights",
        "flash_attention": "scaled_dot_product_attention, FlexAttention",
        "int8_linear": "F.linear, _weight_int8pack_mm",
        "triton_cpu": "the function that does the same",
        "sparse_attention": "scaled_dot_product_attention, FlexAttention",
    },
)
TRANSFORMERS = Peer(
    "transformers",
    ("transformers",),
    {
        "ternary_linear": "BitLinear",
        "small_batches": "BitLinear, when named",
        "bit_linear": "AutoBitLinear",
        "flash_attention": "eager attention",
        "model": "bitlinear and autobitlinear",
        "generate": "autobitlinear with a static cache",
        "linear_attention": "torch_chunk_gated_delta_rule",
        "many_requests": "continuous batching with sdpa",
    },
)
LLAMA_CPP = Peer(
    "llama.cpp",
    ("llama_cpp", "gguf"),
    {"model": "TQ2_0, with heads of 16 and of 8 bits"},
    distribution="llama-cpp-python",
    install="pip install llama-cpp-python gguf",
)
TORCHAO = Peer(
    "torchao",
    ("torchao",),
    {"int8_linear": "Int8WeightOnlyConfig"},
    install="pip install torchao",
)
PEFT = Peer(
    "peft",
    ("peft",),
    {"training_memory": "LoRA beside our packed linears and beside autobitlinear"},
    install="pip install peft",
)
KVPRESS = Peer(
    "kvpress",
    ("kvpress",),
    {"eviction": "what presses keep beside memories that drop tokens"},
    install="pip install --no-deps kvpress, with requests, cachetools, fire, pandas and datasets: "
    "its own range of transformers ends before ours begins",
)
PEERS = (
    TORCH,
    TRANSFORMERS,
    LLAMA_CPP,
    TORCHAO,
    PEFT,
    KVPRESS,
    Peer("bitblas", ("bitblas",), reason="no case runs it (int8 x int2 on NVIDIA GPUs)"),
    Peer("gemlite", ("gemlite",), reason="no case runs it (2-bit weights, float activations)"),
    Peer("bitnet.cpp", reason="a C++ program without a Python module; has its own benchmark"),
)


def from_transformers(name: str) -> Any:
    """Return a name out of transformers' BitNet integration.

    Raises:
        PeerMissingError: transformers, or the name in it, is missing.
    """
    try:
        module = importlib.import_module("transformers.integrations.bitnet")
    except ImportError as error:
        raise PeerMissingError(f"transformers cannot be imported: {error}") from error
    if not hasattr(module, name):
        version = importlib.metadata.version("transformers")
        raise PeerMissingError(f"transformers {version} has no {name} in integrations.bitnet")
    return getattr(module, name)
