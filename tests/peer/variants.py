"""What transformers' tests run on: tiny models of ours, and others with our attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

import bitnet_triton as bt
from bitnet_triton.attention.hub import NAME
from bitnet_triton.models import BitNetConfig, BitNetForCausalLM, BitNetModel

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BITLINEAR = {"quant_method": "bitnet", "linear_class": "bitlinear"}
AUTOBITLINEAR = {
    "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
}  # fmt: skip
ONLINE = AUTOBITLINEAR | {"quantization_mode": "online"}

# Every attention mode; windows and blocks are shorter than the 7 tokens of the inputs
MODES: dict[str, Any] = {
    "Full": "full",
    "Sliding": {"mode": "sliding", "window": 4, "sinks": 1},
    "Streaming": {"mode": "streaming", "window": 4, "sinks": 1},
    "Longformer": {"mode": "longformer", "window": 4, "global_tokens": [0]},
    "Local": {"mode": "local", "block": 4},
    "Strided": {"mode": "strided", "block": 3},
    "Fixed": {"mode": "fixed", "block": 4},
    "TopK": {"mode": "top_k", "keys": 3},
    "Threshold": {"mode": "threshold", "share": 0.2},
}

# Other models, by the name that their classes begin with
OTHERS = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "Gemma3": {
        "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
    },
    "Phi": {},
    "Phi3": {"sliding_window": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One subject of the tests."""

    kind: type  # of the config
    models: tuple[type, type]  # the decoder, and the one with a head
    more: dict[str, Any] = field(default_factory=dict)
    trains: bool = True
    attention: str | None = None  # what stands in place of PyTorch's attention

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the config."""
        return SIZES | self.more

    def config(self) -> Any:
        """Return a fresh config."""
        return self.kind(**self.arguments())


class _Fused(BitNetForCausalLM):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if self.device.type != "meta":  # from_pretrained fuses by itself
            bt.fuse(self)


# transformers' tests know models by name
_Fused.__name__ = BitNetForCausalLM.__name__


def _bitnet(quantization_config, head=BitNetForCausalLM, mode=None, attention=None):
    trains = quantization_config in (None, ONLINE)
    more = {"quantization_config": quantization_config} | ({"attention": mode} if mode else {})
    return Variant(BitNetConfig, (BitNetModel, head), more, trains, attention=attention)


def _other(name, more):
    text = "Text" if name == "Gemma3" else ""
    kind, base, head = (
        getattr(transformers, name + ending)
        for ending in (f"{text}Config", f"{text}Model", "ForCausalLM")
    )
    return Variant(kind, (base, head), more, attention=NAME)


VARIANTS = {
    "Dense": _bitnet(None),
    "Bitlinear": _bitnet(BITLINEAR),
    "Autobitlinear": _bitnet(AUTOBITLINEAR),
    "Online": _bitnet(ONLINE),
    "Fused": _bitnet(BITLINEAR, _Fused),
    "FusedAuto": _bitnet(AUTOBITLINEAR, _Fused),
    "DenseHub": _bitnet(None, attention=NAME),
    "FusedHub": _bitnet(BITLINEAR, _Fused, attention=NAME),
}
for _name, _mode in MODES.items():
    VARIANTS[f"Plan{_name}"] = _bitnet(None, mode=_mode)
    VARIANTS[f"FusedPlan{_name}"] = _bitnet(BITLINEAR, _Fused, mode=_mode)
VARIANTS |= {f"Hub{_name}": _other(_name, _more) for _name, _more in OTHERS.items()}
