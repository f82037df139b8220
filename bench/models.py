"""Whole ternary models with random weights, built in memory; equal codes for every provider."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.bitnet.configuration_bitnet import BitNetConfig as HfBitNetConfig
from transformers.utils.quantization_config import BitNetQuantConfig

from bench.case import Settings
from bench.peers import from_transformers
from bitnet_triton import BitNetConfig, fuse, quantize_head
from bitnet_triton.kernels.packing import unpack_codes

DTYPE = torch.bfloat16
# Every branch that is added in bf16 leaves a rounding error, and quantisers make jumps of it: with
# branches as large as the embedding, two right ways to compute 30 layers differ by 5 per cent
_BRANCHES_TO_EMBEDDING = 1 / 8


@dataclass(frozen=True)
class Shape:
    """The widths of a model; the defaults are those of BitNet b1.58 2B-4T."""

    hidden: int = 2560
    ffn: int = 6912
    heads: int = 20
    kv_heads: int = 5
    vocab: int = 128256
    layers: int = 30

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the linears of one layer, by the name of their module."""
        kv = self.kv_heads * self.head_size
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    @property
    def layer_weights(self) -> int:
        """Number of ternary weights in one layer."""
        return sum(N * K for N, K in self.linears.values())

    @property
    def head_weights(self) -> int:
        """Number of weights of the head, which is the embedding too."""
        return self.vocab * self.hidden

    def kv_bytes(self, tokens: int) -> int:
        """Size of the cached keys and values of one sequence."""
        return 2 * self.layers * self.kv_heads * self.head_size * tokens * DTYPE.itemsize

    def config(self, config_class: type[HfBitNetConfig], **more: Any) -> HfBitNetConfig:
        """Return a config without a quantisation of its own."""
        return config_class(
            **more,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )


SHAPES = {
    "2b4t": Shape(),
    "tiny": Shape(hidden=64, ffn=128, heads=4, kv_heads=2, vocab=256, layers=2),
}


class RandomModels:
    """Builds each model once; packed codes and embeddings are shared.

    Args:
        shape: the widths.
        settings: device and seed.
    """

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.shape = shape
        self.device = settings.device
        random = settings.generator
        self.embedding = nn.Parameter(
            torch.randn(
                (shape.vocab, shape.hidden), generator=random, device=self.device, dtype=DTYPE
            ),
            requires_grad=False,
        )
        # the bytes that hold four valid codes
        valid = [b for b in range(256) if not (b & (b >> 1) & 0b01010101)]
        table = torch.tensor(valid, dtype=torch.uint8, device=self.device)
        self.packed: dict[str, Tensor] = {}
        for i in range(shape.layers):
            for name, (N, K) in shape.linears.items():
                draw = torch.randint(
                    len(valid), (N // 4, K), generator=random, device=self.device,
                    dtype=torch.uint8,
                )  # fmt: skip
                self.packed[f"model.layers.{i}.{name}"] = table[draw.int()]
        self._built: dict[tuple[str, str], PreTrainedModel] = {}

    def scale(self, name: str) -> float:
        """Return the scale of a linear: a power of two, exact in bf16 as its reciprocal is.

        Linears keep the variance of their input; those that end a residual branch shrink it, so
        that all branches together stay well below the embedding.
        """
        K = self.packed[name].shape[1]
        deviation = math.sqrt(1.5 / K)  # a code has the variance 2 / 3
        if name.endswith(("o_proj", "down_proj")):
            deviation *= _BRANCHES_TO_EMBEDDING / math.sqrt(2 * self.shape.layers)
        return 2.0 ** round(math.log2(deviation))

    def get(self, kind: str, attention: Any = None) -> PreTrainedModel:
        """Return ours ("fused", "int8_head", "unfused", "masters") or theirs ("bitlinear", ...).

        With ``attention``, ours have that mode or plan.
        """
        key = kind, json.dumps(attention)
        if key not in self._built:
            self._built[key] = self._build(kind, attention)
        return self._built[key]

    def _build(self, kind: str, attention: Any) -> PreTrainedModel:
        if kind.startswith("fused"):
            return fuse(self._ours(attention))
        if kind == "masters":
            return self._masters()
        if kind == "int8_head":
            return quantize_head(fuse(self._ours(attention)))
        return self._ours(attention) if kind == "unfused" else self._transformers(kind)

    def _ours(self, attention: Any) -> PreTrainedModel:
        more = {} if attention is None else {"attention": attention}
        config = self.shape.config(BitNetConfig, **more)
        config.quantization_config = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        }
        return self._filled(self._skeleton(config), self._fill_ours)

    def _masters(self) -> PreTrainedModel:
        """Return a model that trains whole: everything in float32, and of its own."""
        config = self.shape.config(BitNetConfig)
        config.quantization_config = {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        }
        return self._filled(self._skeleton(config), self._fill_masters).float()

    def _fill_masters(self, layer: nn.Module, packed: Tensor, scale: float) -> None:
        layer.weight = nn.Parameter(unpack_codes(packed).to(DTYPE) * scale)

    def _fill_ours(self, layer: nn.Module, packed: Tensor, scale: float) -> None:
        state = {"weight": packed, "weight_scale": torch.tensor([scale], device=self.device)}
        layer.load_state_dict(state, assign=True)  # names and layout are those of checkpoints

    def _transformers(self, linear_class: str) -> PreTrainedModel:
        replace = from_transformers("replace_with_bitnet_linear")
        model = self._skeleton(self.shape.config(HfBitNetConfig))
        quantization = BitNetQuantConfig(linear_class=linear_class, quantization_mode="offline")
        replace(model, ["lm_head"], quantization)
        packed = linear_class == "bitlinear"
        return self._filled(model, self._fill_bitlinear if packed else self._fill_autobitlinear)

    def _fill_bitlinear(self, layer: nn.Module, packed: Tensor, scale: float) -> None:
        layer.weight = packed
        layer.weight_scale = torch.tensor([1 / scale], dtype=DTYPE, device=self.device)

    def _fill_autobitlinear(self, layer: nn.Module, packed: Tensor, scale: float) -> None:
        layer.weight = nn.Parameter(unpack_codes(packed).to(DTYPE), requires_grad=False)
        layer.weight_scale = torch.tensor([scale], dtype=DTYPE, device=self.device)

    def _skeleton(self, config: HfBitNetConfig) -> PreTrainedModel:
        # a mode of ours goes with no other implementation
        has_mode = getattr(config, "attention", None) is not None
        implementation = None if has_mode else "sdpa"
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=DTYPE, attn_implementation=implementation
            ).eval()

    def _filled(
        self, model: PreTrainedModel, fill: Callable[[nn.Module, Tensor, float], None]
    ) -> PreTrainedModel:
        base = model.model
        with torch.device(self.device):
            base.rotary_emb = type(base.rotary_emb)(base.config)
        for name, packed in self.packed.items():
            fill(model.get_submodule(name), packed, self.scale(name))
        base.embed_tokens.weight = model.lm_head.weight = self.embedding
        for module in model.modules():
            for key, tensor in list(module.named_parameters(recurse=False)):
                if tensor.is_meta:  # what is left are norms
                    ones = torch.ones(tensor.shape, dtype=tensor.dtype, device=self.device)
                    setattr(module, key, nn.Parameter(ones, requires_grad=False))
        left = [name for name, tensor in model.named_buffers() if tensor.is_meta]
        assert not left, f"no values for {left}"
        return model


def state_bytes(model: nn.Module) -> int:
    """Return the size of all parameters and buffers; tied ones count once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.nbytes for t in tensors.values())
