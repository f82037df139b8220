"""How transformers loads a ternary checkpoint with our linears: a quantiser of its own kind.

It is registered under the name ``bitnet_triton``, beside transformers' ``bitnet``; the name exists
in memory only. A checkpoint always says ``bitnet``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitNetQuantConfig as HfBitNetQuantConfig

from bitnet_triton.kernels import TernaryWeight
from bitnet_triton.models.checkpoint import check_checkpoint, unpacked_layers
from bitnet_triton.nn import BitLinear, PackedBitLinear, use_output_head

PUBLISHED_METHOD = "bitnet"
METHOD = "bitnet_triton"


@register_quantization_config(METHOD)
class BitNetQuantConfig(HfBitNetQuantConfig):
    """transformers' BitNet quantisation config under the method that leads to our quantiser.

    Its name is that of transformers: who hands a config to ``from_pretrained`` for a model that
    has one (lm-eval does) must hand one of the same class, which transformers tells by its name.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.quant_method = METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as every published checkpoint has it."""
        return on_disk(super().to_dict())


def in_memory(quantization_config: Mapping[str, Any] | HfBitNetQuantConfig) -> dict[str, Any]:
    """Return a quantisation config as plain data that leads transformers to our quantiser.

    Raises:
        TypeError: it is neither a mapping nor a quantisation config of transformers.
        ValueError: ``quant_method`` is not ``bitnet``.
    """
    if hasattr(quantization_config, "to_dict"):
        quantization_config = quantization_config.to_dict()
    if not isinstance(quantization_config, Mapping):
        raise TypeError(
            f"`quantization_config`: expected a dict, got {type(quantization_config).__name__}"
        )
    method = quantization_config.get("quant_method")
    if method not in (PUBLISHED_METHOD, METHOD):
        raise ValueError(f"`quant_method`: expected {PUBLISHED_METHOD!r}, got {method!r}")
    return {**quantization_config, "quant_method": METHOD}


def as_argument(quantization_config: Any) -> Any:
    """Return what ``from_pretrained`` takes as ``quantization_config``; a dict is fine as well.

    Raises:
        TypeError, ValueError: as ``in_memory``.
    """
    if quantization_config is None:
        return None
    return BitNetQuantConfig.from_dict(in_memory(quantization_config))


def on_disk(quantization_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a quantisation config as it stands in a checkpoint."""
    return {**quantization_config, "quant_method": PUBLISHED_METHOD}


def _linears(model: nn.Module, skip: list[str]) -> Iterator[tuple[str, nn.Linear]]:
    # what an attention mode has brought, unless it asks for ternary weights
    passed = {
        module
        for parent in model.modules()
        if getattr(parent, "stays_dense", False)
        for module in parent.modules()
    }
    for name, module in list(model.named_modules()):
        if module in passed:
            continue
        is_ours = isinstance(module, (BitLinear, PackedBitLinear))
        is_dense = isinstance(module, nn.Linear) and not is_ours
        if is_dense and should_convert_module(name, skip):
            yield name, module


def replace_linears(
    model: PreTrainedModel, quantization_config: Mapping[str, Any] | HfBitNetQuantConfig
) -> None:
    """Replace the dense linears and the head of ``model`` by ours, in place; ours stay.

    Raises:
        ValueError: a linear cannot be packed, or ``quantization_config`` holds an invalid value.
    """
    config = quantization_config
    if not isinstance(config, HfBitNetQuantConfig):
        config = BitNetQuantConfig(**config)
    skip = HfQuantizer.get_modules_to_not_convert(
        model, config.modules_to_not_convert, list(model._keep_in_fp32_modules or ())
    )
    for name, linear in _linears(model, skip):
        model.set_submodule(name, _our_linear(name, linear, config))
    use_output_head(model)


def _our_linear(name: str, linear: nn.Linear, config: HfBitNetQuantConfig) -> nn.Module:
    norm = None
    if config.use_rms_norm:
        with torch.device(linear.weight.device):
            norm = LlamaRMSNorm(linear.in_features, eps=config.rms_norm_eps)  # type: ignore[arg-type]
    if config.linear_class == "autobitlinear" and config.quantization_mode == "online":
        return BitLinear.from_linear(linear, norm)
    divides = config.linear_class == "bitlinear"
    try:
        return PackedBitLinear.from_linear(linear, scale_divides=divides, rms_norm=norm)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@register_quantizer(METHOD)
class TernaryHfQuantizer(BitNetHfQuantizer):
    """Loads every BitNet format into our linears, after the whole checkpoint was checked."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Accept every device: our linears run on all of them."""

    def get_load_operations(self) -> dict:
        """Load tensors as they are stored: they stay packed."""
        return {}

    def get_weight_conversions(self) -> list:
        """Load tensors as they are stored; the name of the above in transformers 5.17."""
        return []

    @property
    def is_trainable(self) -> bool:
        """Tell ``Trainer`` that adapters may be trained beside the weights, packed ones too."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Tell ``generate`` that the linears trace without a graph break."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        replace_linears(model, self.quantization_config)
        files = checkpoint_files or []
        self._unpacked = unpacked_layers(model, files)
        for layer in self._unpacked_layers(model):
            shape = (layer.out_features, layer.in_features)
            layer.weight = torch.empty(shape, dtype=torch.int8, device="meta")
        if files:
            check_checkpoint(model, files)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for layer in self._unpacked_layers(model):
            layer.weight = TernaryWeight.from_codes(layer.weight.to(torch.int8), 1.0).packed
        return model

    def _unpacked_layers(self, model: PreTrainedModel) -> Iterator[PackedBitLinear]:
        for name in self._unpacked:
            layer = model.get_submodule(name)
            if isinstance(layer, PackedBitLinear):  # parts of it are packed as they are read
                yield layer
