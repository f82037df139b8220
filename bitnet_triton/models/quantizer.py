"""How transformers loads a ternary checkpoint with our linears: a quantiser of its own kind.

It is registered under the name ``bitnet_triton``, beside transformers' ``bitnet``; the name exists
in memory only. A checkpoint always says ``bitnet``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitNetQuantConfig

from bitnet_triton.kernels import TernaryWeight
from bitnet_triton.models.checkpoint import check_checkpoint, unpacked_layers
from bitnet_triton.nn import BitLinear, PackedBitLinear

METHOD = "bitnet_triton"


@register_quantization_config(METHOD)
class TernaryQuantConfig(BitNetQuantConfig):
    """transformers' BitNet quantisation config under the name that leads to our quantiser."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as every published checkpoint has it."""
        return {**super().to_dict(), "quant_method": "bitnet"}


def in_memory_method(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of ``config`` whose quantisation method leads to our quantiser."""
    config = copy.deepcopy(config)
    found = getattr(config, "quantization_config", None)
    if found is not None:
        plain = found if isinstance(found, dict) else found.to_dict()
        if plain.get("quant_method") not in ("bitnet", METHOD):
            raise ValueError(
                f"`quant_method`: expected 'bitnet', got {plain.get('quant_method')!r}"
            )
        config.quantization_config = {**plain, "quant_method": METHOD}
    return config


def _as_config(quantization_config: Any) -> BitNetQuantConfig:
    if isinstance(quantization_config, BitNetQuantConfig):
        return quantization_config
    return TernaryQuantConfig(**quantization_config)


def _linears(model: nn.Module, skip: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in list(model.named_modules()):
        is_dense = isinstance(module, nn.Linear) and not isinstance(module, BitLinear)
        if is_dense and should_convert_module(name, skip):
            yield name, module


def replace_linears(model: PreTrainedModel, quantization_config: Any) -> None:
    """Replace the dense linears of ``model`` by ours, in place; those that are ours stay."""
    config = _as_config(quantization_config)
    skip = HfQuantizer.get_modules_to_not_convert(
        model, config.modules_to_not_convert, model._keep_in_fp32_modules
    )
    for name, linear in _linears(model, skip):
        norm = None
        if config.use_rms_norm:
            with torch.device(linear.weight.device):
                norm = LlamaRMSNorm(linear.in_features, eps=config.rms_norm_eps)
        model.set_submodule(name, _our_linear(linear, config, norm))


def _our_linear(
    linear: nn.Linear, config: BitNetQuantConfig, norm: nn.Module | None
) -> nn.Module:
    if config.linear_class == "autobitlinear" and config.quantization_mode == "online":
        return BitLinear.from_linear(linear, norm)
    divides = config.linear_class == "bitlinear"
    return PackedBitLinear.from_linear(linear, scale_divides=divides, rms_norm=norm)


@register_quantizer(METHOD)
class TernaryHfQuantizer(BitNetHfQuantizer):
    """Loads every BitNet format into our linears, after the whole checkpoint was checked."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Accept every device: our linears run on all of them."""

    def get_load_operations(self) -> dict:
        """Load tensors as they are stored: they stay packed."""
        return {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        replace_linears(model, self.quantization_config)
        files = checkpoint_files or []
        self._unpacked = unpacked_layers(model, files)
        for name in self._unpacked:
            layer = model.get_submodule(name)
            shape = (layer.out_features, layer.in_features)
            layer.weight = torch.empty(shape, dtype=layer.weight_scale.dtype, device="meta")
        if files:
            check_checkpoint(model, files)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for name in self._unpacked:
            layer = model.get_submodule(name)
            packed = TernaryWeight.from_codes(layer.weight.to(torch.int8), 1.0)
            layer.weight = packed.packed
        return model
