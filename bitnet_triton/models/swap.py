"""use_ternary_kernels: swap the linears of a model that transformers loaded."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear, BitNetDeserialize
from transformers.integrations.bitnet import BitLinear as HfBitLinear

from bitnet_triton.kernels import TernaryWeight
from bitnet_triton.models.fuse import fuse_after_loading
from bitnet_triton.models.onebit import config_objection
from bitnet_triton.nn import BitLinear, PackedBitLinear, use_output_head

Model = TypeVar("Model", bound=nn.Module)


def use_ternary_kernels(model: Model, *, fuse: bool = True) -> Model:
    """Replace transformers' BitLinear layers of ``model`` by ours, in place.

    Works for any architecture that was loaded with ``quant_method: bitnet``: packed
    (``bitlinear``), ``autobitlinear`` offline, whose weights shrink to two bits, and online, which
    stays trainable. Weights are shared or packed, never quantised anew. A dense output head keeps
    its weights and multiplies plain matrices (``OutputHead``).

    Args:
        model: a loaded model, on any device.
        fuse: run inference in few kernels as well, as ``bitnet_triton.fuse`` does, if the
            architecture and its weights allow it; the log says why where they do not.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no such layer, a layer holds no valid codes or scale, or
            transformers has divided the model among processes; then nothing was changed.
    """
    if (getattr(model, "_tp_size", None) or 1) > 1 and getattr(model, "processes", None) is None:
        raise ValueError(
            "`model`: expected a whole one: transformers' styles of tensor parallelism do not "
            "divide packed weights; `BitNetForCausalLM.from_pretrained` divides its own"
        )
    found = {n: m for n, m in model.named_modules() if isinstance(m, (HfBitLinear, AutoBitLinear))}
    if not found:
        has_ours = any(isinstance(m, (BitLinear, PackedBitLinear)) for m in model.modules())
        if has_ours:
            return fuse_after_loading(model) if fuse else model
        objection = config_objection(getattr(model, "config", {}))
        if objection is not None:
            raise ValueError(f"`model`: {objection}")
        raise ValueError(
            "`model`: expected BitLinear layers of transformers (a checkpoint with "
            f"`quant_method: bitnet`), got {type(model).__name__} without any"
        )
    ours = {name: _convert(name, layer) for name, layer in found.items()}
    for name, layer in ours.items():
        model.set_submodule(name, layer)
    use_output_head(model)
    _forget_unpacking(model)
    return fuse_after_loading(model) if fuse else model


def _forget_unpacking(model: nn.Module) -> None:
    # transformers remembers that it unpacked the checkpoint and would undo it while saving; our
    # layers already hold what a checkpoint holds
    conversions = getattr(model, "_weight_conversions", None)
    if isinstance(conversions, list):
        conversions[:] = [
            conversion
            for conversion in conversions
            if not any(
                isinstance(operation, BitNetDeserialize)
                for operation in getattr(conversion, "operations", ())
            )
        ]


def _convert(name: str, layer: HfBitLinear | AutoBitLinear) -> nn.Module:
    if layer.weight.device.type == "meta":
        raise ValueError(
            f"`model`: layer {name}: its weight is offloaded; load the model without offloading"
        )
    try:
        if isinstance(layer, HfBitLinear):
            return _from_packed(layer)
        if layer.online_quant:
            return BitLinear.from_linear(layer, layer.rms_norm)
        return _from_unpacked(layer)
    except ValueError as error:
        raise ValueError(f"`model`: layer {name}: {error}") from error


def _empty_packed(layer: HfBitLinear | AutoBitLinear, *, scale_divides: bool) -> PackedBitLinear:
    with torch.device("meta"):
        ours = PackedBitLinear(
            layer.in_features,
            layer.out_features,
            scale_divides=scale_divides,
            rms_norm=layer.rms_norm,
        )
    ours.weight_scale = layer.weight_scale.float()
    ours.bias = None if layer.bias is None else layer.bias.detach()
    return ours.train(layer.training)


def _from_packed(layer: HfBitLinear) -> PackedBitLinear:
    ours = _empty_packed(layer, scale_divides=True)
    ours.weight = TernaryWeight.from_checkpoint(layer.weight, layer.weight_scale).packed
    return ours


def _from_unpacked(layer: AutoBitLinear) -> PackedBitLinear:
    ours = _empty_packed(layer, scale_divides=False)
    codes = layer.weight.detach()
    if not bool(((codes == 0) | (codes.abs() == 1)).all()):
        raise ValueError("expected codes -1, 0 and 1 in `weight`")
    ours.weight = TernaryWeight.from_codes(codes.to(torch.int8), layer.weight_scale).packed
    return ours
