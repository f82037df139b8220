"""merge_adapters: add LoRA adapters to ternary weights, and say what that has changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitnet_triton.kernels import TernaryWeight, quantize_weight
from bitnet_triton.nn import BitLinear, PackedBitLinear

logger = logging.getLogger("bitnet_triton")

_RANDOM_TOKENS = 64
_ROUNDS = 64  # at most: small adapters need two or three, larger ones than weights some twenty


@dataclass(frozen=True)
class AdapterMerge:
    """What ``merge_adapters`` returns.

    Attributes:
        model: the model without adapters, their products in its masters or packed weights.
        changed_codes: of each ternary linear that had an adapter, the share of codes that changed.
        logits_change: norm of the change of all logits over their norm beside the adapters.
    """

    model: PreTrainedModel
    changed_codes: dict[str, float]
    logits_change: float


def merge_adapters(model: nn.Module, *, input_ids: Tensor | None = None) -> AdapterMerge:
    """Merge the adapters of a peft model into its ternary weights, and measure what that changes.

    Beside a ternary linear an adapter adds B A x to the product; merged, W + B A is quantised anew,
    and most of B A is rounded away or changes codes: another model. What changed is measured, and
    told in the log at WARNING. Masters stay masters; packed weights become the nearest packed ones
    (least squares over codes and scale), one matrix unpacked at a time.

    Args:
        model: a ``peft.PeftModel`` with adapters beside ``BitLinear`` or ``PackedBitLinear``; it is
            used up, as by peft's ``merge_and_unload``, which cannot merge into packed weights.
        input_ids: int64 [B T], text to compare logits on. Default: 64 random tokens.

    Returns:
        The merged model and the figures.

    Raises:
        ImportError: peft is not installed.
        TypeError: ``model`` is no peft model.
        ValueError: no ternary linear has an adapter, or adapters are merged already.
        RuntimeError: an adapter has a bias and its linear has none; peft says so.
    """
    adapters = dict(_adapted(model))
    if not adapters:
        raise ValueError("`model`: expected adapters beside BitLinear layers, got none")
    layers = {name: adapter.get_base_layer() for name, adapter in adapters.items()}
    codes = {name: _codes(layer) for name, layer in layers.items()}
    peft_model: Any = model
    if input_ids is None:
        vocabulary = peft_model.get_base_model().config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(vocabulary, (1, _RANDOM_TOKENS), generator=generator)
    before = _logits(model, input_ids)
    packed = {n: a for n, a in adapters.items() if isinstance(layers[n], PackedBitLinear)}
    weights = {name: _merged_weight(adapter) for name, adapter in packed.items()}
    for name, weight in weights.items():
        _replace_weight(layers[name], weight)
        peft_model.get_base_model().set_submodule(name, layers[name])
    merged = peft_model.merge_and_unload(safe_merge=True)
    change = (_logits(merged, input_ids) - before).norm() / before.norm()
    done = AdapterMerge(
        model=merged,
        changed_codes={
            name: (_codes(layer) != codes[name]).float().mean().item()
            for name, layer in layers.items()
        },
        logits_change=change.item(),
    )
    most = max(done.changed_codes, key=done.changed_codes.__getitem__)
    logger.warning(
        "adapters were merged into ternary weights, which were quantised anew: logits changed by "
        "%.2g %%, and up to %.2g %% of the codes of a layer (%s)",
        100 * done.logits_change, 100 * done.changed_codes[most], most,
    )  # fmt: skip
    return done


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Return names and peft's layers of the ternary linears that have adapters beside them."""
    try:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("merging adapters needs peft: pip install peft") from error
    if not isinstance(model, PeftModel):
        raise TypeError(f"`model`: expected a peft.PeftModel, got {type(model).__name__}")
    decoder = model.get_base_model()
    for name, module in decoder.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        layer = module.get_base_layer()
        if module.merged:
            raise ValueError(
                f"`model`: {name}: expected adapters beside the weight, got merged ones; "
                "unmerge_adapter() first"
            )
        if isinstance(layer, (BitLinear, PackedBitLinear)):
            yield name, module


@torch.no_grad()
def _merged_weight(adapter: Any) -> TernaryWeight:
    """Return what is nearest to the weight and its adapters; nothing is changed."""
    layer: PackedBitLinear = adapter.get_base_layer()
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    codes, scale = layer.ternary_weight.codes(), layer.ternary_weight.scale
    dense.weight = nn.Parameter(codes * scale, requires_grad=False)
    # peft's own sum, whatever the kind of its adapters
    adapter.base_layer = dense
    try:
        adapter.merge(safe_merge=True)
    finally:
        adapter.base_layer = layer
        adapter.merged_adapters.clear()
    return _nearest(dense.weight, scale)


def _nearest(weight: Tensor, scale: Tensor) -> TernaryWeight:
    """Return codes and a scale near ``weight`` [N, K], by least squares from ``scale`` on."""
    codes = torch.zeros_like(weight)
    for _ in range(_ROUNDS):
        former, codes = codes, (weight / scale).round_().clamp_(-1, 1)
        count = codes.count_nonzero()
        if count == 0 or torch.equal(codes, former):
            break
        scale = ((weight * codes).sum(dtype=torch.float64) / count).float().view(1)
    return TernaryWeight.from_codes(codes.to(torch.int8), scale)


@torch.no_grad()
def _replace_weight(layer: PackedBitLinear, weight: TernaryWeight) -> None:
    former = layer.ternary_weight.scale
    layer.weight = weight.packed
    layer.weight_scale = weight.scale.reciprocal() if layer.scale_divides else weight.scale
    if layer.bias is not None and not layer.scale_divides:
        layer.bias = (layer.bias * (former / weight.scale)).to(layer.bias.dtype)


def _codes(layer: BitLinear | PackedBitLinear) -> Tensor:
    if isinstance(layer, PackedBitLinear):
        return layer.ternary_weight.codes()
    weight = layer.weight.detach()
    if layer.levels == "binary":
        return weight.float() > weight.float().mean()
    return quantize_weight(weight)[0]


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the logits [B T vocabulary] in float32, without dropout."""
    was_training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    try:
        # with gradients every layer runs module by module, with adapters and without: fused layers
        # round otherwise, and that is no change of weights
        with torch.enable_grad():
            logits = model.eval()(input_ids=input_ids.to(device), use_cache=False)[0]
        return logits.detach().float()
    finally:
        for module in was_training:
            module.training = True
