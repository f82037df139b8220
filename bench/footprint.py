"""What a model takes of the memory: while it is loaded from a file, and while it decodes.

Each provider runs in a process of its own, so that the largest resident size is its alone. Files
that are mapped count with the pages that were read.

As a script: ``python -m bench.footprint PROVIDER PATH THREADS``, which is what ``measure`` starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.bitnet.configuration_bitnet import BitNetConfig as HfBitNetConfig

import bitnet_triton
from bench.case import PeerMissingError, Settings
from bench.llamacpp import LlamaCpp, peak_resident_bytes, write_gguf
from bench.models import DTYPE, RandomModels, Shape
from bench.peers import LLAMA_CPP

_PROMPT, _STEPS = 32, 2
_HEADS = {"llama_cpp": "F16", "llama_cpp_q8_head": "Q8_0"}
LABELS = {
    "bitnet_triton": "bitnet_triton",
    "bitnet_triton_int8_head": "bitnet_triton, int8 head",
    "transformers_packed": "hf bitlinear",
    "transformers_bf16": "hf autobitlinear",
    "llama_cpp": "llama.cpp TQ2_0",
    "llama_cpp_q8_head": "llama.cpp TQ2_0, q8 head",
}


def write_checkpoint(folder: Path, shape: Shape, linear_class: str) -> int:
    """Write a packed checkpoint as transformers does; return the size of its weights' file.

    Args:
        folder: is made.
        shape: the widths.
        linear_class: "autobitlinear", as published, or "bitlinear".
    """
    folder.mkdir()
    models = RandomModels(shape, Settings())
    divides = linear_class == "bitlinear"
    tensors = {"model.embed_tokens.weight": models.embedding.data}
    for name, packed in models.packed.items():
        scale = models.scale(name)
        tensors[f"{name}.weight"] = packed
        tensors[f"{name}.weight_scale"] = torch.tensor([1 / scale if divides else scale]).to(DTYPE)
    norms = {"input_layernorm": shape.hidden, "post_attention_layernorm": shape.hidden,
             "self_attn.attn_sub_norm": shape.hidden, "mlp.ffn_sub_norm": shape.ffn}  # fmt: skip
    for i in range(shape.layers):
        for name, width in norms.items():
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(width, dtype=DTYPE)
    tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=DTYPE)
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    config = shape.config(HfBitNetConfig).to_dict() | {
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": linear_class,
            "quantization_mode": "offline",
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path.stat().st_size


def measure(shape: Shape, names: Sequence[str], threads: int) -> list[dict[str, Any]]:
    """Return for each provider the sizes of its file and of its memory.

    Args:
        shape: of the model.
        names: of the providers.
        threads: that each computes with.
    """
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        written: dict[str, tuple[Path, int]] = {}
        for name in names:
            row: dict[str, Any] = {"provider": name, "label": LABELS[name], "status": "measured"}
            try:
                path, row["file_bytes"] = _file(name, Path(temporary), shape, written)
                row |= _run(name, path, threads)
            except PeerMissingError as missing:
                row |= {"status": "missing", "reason": str(missing)}
            rows.append(row)
    return rows


def _file(
    name: str, folder: Path, shape: Shape, written: dict[str, tuple[Path, int]]
) -> tuple[Path, int]:
    """Return the file that a provider loads, and its size; write it if nobody has."""
    if name in _HEADS:
        LLAMA_CPP.need()
        kind = _HEADS[name]
    else:
        kind = "bitlinear" if name == "transformers_packed" else "autobitlinear"
    if kind not in written:
        path = folder / kind
        if name in _HEADS:
            written[kind] = path, write_gguf(path, shape, head=kind)
        else:
            written[kind] = path, write_checkpoint(path, shape, kind)
    return written[kind]


def _run(name: str, path: Path, threads: int) -> dict[str, Any]:
    if name in _HEADS:
        return _run_llama(path, threads)
    done = subprocess.run(
        [sys.executable, "-m", "bench.footprint", name, path, str(threads)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_llama(path: Path, threads: int) -> dict[str, Any]:
    peer = LlamaCpp(path, threads=threads, context=_PROMPT + _STEPS)
    try:
        loaded = peer.peak_memory()
        peer.prefill(_PROMPT)
        for _ in range(_STEPS):
            peer.decode()
        # Python and the library take some fifty megabytes of it, which nobody can tell apart
        return {"imported_bytes": 0, "loaded_bytes": loaded, "decoded_bytes": peer.peak_memory()}
    finally:
        peer.close()


def _loaders() -> dict[str, Callable[[str], PreTrainedModel]]:
    def ours(path: str) -> PreTrainedModel:
        return bitnet_triton.BitNetForCausalLM.from_pretrained(path)

    def theirs(path: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE)

    return {
        "bitnet_triton": ours,
        "bitnet_triton_int8_head": lambda path: bitnet_triton.quantize_head(ours(path)),
        "transformers_packed": theirs,
        "transformers_bf16": theirs,
    }


def _worker(name: str, path: str, threads: int) -> dict[str, int]:
    """Load and decode in this process; return its largest sizes so far, beyond the imports."""
    torch.set_num_threads(threads)
    load = _loaders()[name]
    imported = peak_resident_bytes()
    model = load(path).eval()
    loaded = peak_resident_bytes()
    ids = torch.arange(_PROMPT)[None]
    with torch.no_grad():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=_STEPS,
            min_new_tokens=_STEPS, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    decoded = peak_resident_bytes()
    return {
        "imported_bytes": imported,
        "loaded_bytes": loaded - imported,
        "decoded_bytes": decoded - imported,
    }


if __name__ == "__main__":
    print(json.dumps(_worker(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
