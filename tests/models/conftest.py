"""Tiny checkpoints in every format, written with transformers' own code, and their oracle.

Tests in this folder run on the backend that a user gets, with one thread: in models this small a
second one only waits for the first. Those that ask for ``default_backend`` have all threads; those
that ask for ``reference_backend`` run on that one, for what no kernel has a part in.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import BitNetConfig as HfBitNetConfig
from transformers import BitNetForCausalLM as HfBitNetForCausalLM
from transformers.integrations.bitnet import pack_weights

from bitnet_triton.runtime.select import ENVIRONMENT_VARIABLE

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FORMATS = {
    "bitlinear": {"linear_class": "bitlinear"},
    "packed": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "codes": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "dense": None,
}
# (config, model) of transformers; their linears have equal names
ARCHITECTURES = {
    "bitnet": (HfBitNetConfig, HfBitNetForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


@dataclass(frozen=True)
class Variant:
    """One checkpoint; its fields are the parameters of the fixture ``checkpoint``."""

    format: str = "packed"
    arch: str = "bitnet"
    dtype: torch.dtype = torch.float32
    tied: bool = False
    bias: bool = False
    rms_norm: bool = False
    base: bool = False
    shards: int = 1
    config: str = "{}"  # JSON, more fields of the config

    def build(self) -> PreTrainedModel:
        """Build transformers' dense model with weights in which every tensor matters."""
        config_class, model_class = ARCHITECTURES[self.arch]
        config = config_class(
            **{**SIZES, **json.loads(self.config)},
            tie_word_embeddings=self.tied,
            attention_bias=self.bias,
        )
        model = model_class(config)
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            std = 1.0 if "embed_tokens" in name else 0.2 if "norm" in name else 0.05
            torch.nn.init.normal_(parameter, mean, std)
        return model.to(self.dtype)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scale as transformers' WeightQuant computes them."""
    scale = 1.0 / weight.float().abs().mean().clamp_(min=1e-5)
    return (weight.float() * scale).round().clamp(-1, 1), 1 / scale


def convert(name: str, weight: Tensor, variant: Variant) -> dict[str, Tensor]:
    """Return what a master weight becomes in the format of ``variant``."""
    stored = {}
    if variant.rms_norm:
        norm = 1 + 0.2 * torch.randn(weight.shape[1])
        stored[name.replace(".weight", ".rms_norm.weight")] = norm.to(variant.dtype)
    if variant.format == "online":
        return {**stored, name: weight}
    codes, scale = quantize(weight)
    scale = 1 / scale if variant.format == "bitlinear" else scale
    stored[name.replace(".weight", ".weight_scale")] = scale.reshape(1).to(variant.dtype)
    # pack_weights changes its argument
    is_packed = variant.format != "codes"
    stored[name] = pack_weights(codes.clone()) if is_packed else codes.to(variant.dtype)
    return stored


def write(variant: Variant, folder: Path) -> None:
    """Write the checkpoint of ``variant``; the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = variant.build()
        config = model.config
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            if variant.tied and name == "lm_head.weight":
                continue
            if name.endswith("_proj.weight") and variant.format != "dense":
                tensors |= convert(name, tensor, variant)
            else:
                tensors[name] = tensor
    if variant.base:
        tensors = {n.removeprefix("model."): t for n, t in tensors.items() if "lm_head" not in n}
    if variant.format != "dense":
        quantization = dict(FORMATS[variant.format], quant_method="bitnet")
        if variant.rms_norm:
            quantization |= {"use_rms_norm": True, "rms_norm_eps": 1e-5}
        config.quantization_config = quantization
    config.dtype = variant.dtype
    name = type(model).__name__
    config.architectures = [name.replace("ForCausalLM", "Model") if variant.base else name]
    config.save_pretrained(folder)
    save_tensors(tensors, folder, variant.shards)


def save_tensors(tensors: dict[str, Tensor], folder: Path, shards: int = 1) -> None:
    """Write tensors as one safetensors file, or as several with an index."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function that writes a checkpoint once a session and returns its folder: read only."""
    written: dict[Variant, Path] = {}

    def get(format="packed", **fields) -> Path:
        variant = Variant(format=format, **fields)
        if variant not in written:
            folder = tmp_path_factory.mktemp(format)
            write(variant, folder)
            written[variant] = folder
        return written[variant]

    return get


@pytest.fixture
def save_checkpoint():
    """``save_tensors``, for tests that damage a checkpoint."""
    return save_tensors


@pytest.fixture
def default_backend():
    """Let the test run on the backend that a user gets, with as many threads."""


@pytest.fixture
def reference_backend(monkeypatch):
    """Let the test run on the reference backend: what it looks at no kernel has a part in."""
    # by the environment: threads, as streaming starts them, begin with an empty context
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")


@pytest.fixture(autouse=True)
def _one_thread(request):
    if "default_backend" in request.fixturenames:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def first_output(model, ids, **kwargs) -> Tensor:
    """Return the logits, or the hidden states of a base model, without compiling anything."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(ids, **kwargs)[0]


@pytest.fixture
def logits():
    """``first_output``: transformers decorates its BitNet layers with torch.compile."""
    return first_output


@pytest.fixture
def load_theirs():
    """A function that loads a checkpoint with transformers' own class, compiling nothing."""

    def load(folder, auto=AutoModelForCausalLM, **kwargs) -> PreTrainedModel:
        with torch.compiler.set_stance("force_eager"):
            return auto.from_pretrained(folder, **kwargs)

    return load


@pytest.fixture
def token_ids():
    """Fresh sequences [B, T] without special tokens."""
    return lambda B=24, T=8: torch.randint(3, SIZES["vocab_size"], (B, T))


@pytest.fixture
def draw_clear():
    """A function that draws until no choice on the way of what was drawn is near a tie.

    Two right programs differ by some 2e-6 in scores and logits of small dense models; where two
    of these are closer than that, each program may choose another token or key.
    """

    def draw_clear(draw, distance):
        for _ in range(30):
            value = draw()
            if distance(value) >= 1e-4:
                return value
        raise AssertionError("every draw had a choice near a tie")

    return draw_clear


@pytest.fixture
def token_distance():
    """How far the logits [B T V] of chosen tokens [B T] are from those of any other token."""

    def distance(logits, tokens) -> float:
        chosen = logits.gather(-1, tokens[..., None])
        others = logits.scatter(-1, tokens[..., None], torch.inf)
        return (others - chosen).abs().min().item()

    return distance


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the relative RMS error of the whole tensor."""
    assert value.shape == expected.shape
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def error():
    """``relative_error``."""
    return relative_error


@pytest.fixture
def log(caplog):
    """The lines that say why a model runs module by module."""

    def lines():
        return [r.message for r in caplog.records if "module by module" in r.message]

    with caplog.at_level(logging.INFO, logger="bitnet_triton"):
        yield lines
