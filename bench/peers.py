"""Other libraries: found, or skipped by name with the reason."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

from bench.case import PeerMissingError


@dataclass(frozen=True)
class Peer:
    """A library to compare with.

    Attributes:
        name: what people call it.
        module: what is imported; "" for one that has no Python module.
        compared_in: the cases that run it; empty when none does.
        reason: why none does.
        distribution: that brings the module; "" for one of the same name.
    """

    name: str
    module: str
    compared_in: tuple[str, ...] = ()
    reason: str = ""
    distribution: str = ""

    def state(self) -> str:
        """Return a version, or why the library is skipped."""
        if not self.module:
            return f"skipped: {self.reason}"
        if importlib.util.find_spec(self.module) is None:
            return "skipped: not installed"
        version = importlib.metadata.version(self.distribution or self.module)
        if not self.compared_in:
            return f"skipped: {version} is installed, but {self.reason}"
        return f"{version}, compared in {', '.join(self.compared_in)}"


PEERS = (
    Peer("transformers", "transformers", ("ternary_linear", "bit_linear", "model")),
    Peer("llama.cpp", "llama_cpp", ("model",), distribution="llama-cpp-python"),
    Peer("bitblas", "bitblas", reason="no case runs it yet (int8 x int2 on NVIDIA GPUs)"),
    Peer("gemlite", "gemlite", reason="no case runs it yet (2-bit weights, float activations)"),
    Peer("bitnet.cpp", "", reason="a C++ program without a Python module; has its own benchmark"),
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
