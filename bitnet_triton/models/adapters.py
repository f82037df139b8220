"""merge_adapters: add LoRA adapters to ternary masters, and say what that has changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitnet_triton.kernels import quantize_weight
from bitnet_triton.nn import BitLinear

logger = logging.getLogger("bitnet_triton")

_RANDOM_TOKENS = 64


@dataclass(frozen=True)
class AdapterMerge:
    """What ``merge_adapters`` returns.

    Attributes:
        model: the model without adapters, their products in its masters.
        changed_codes: of each ternary linear that had an adapter, the share of codes that changed.
        logits_change: norm of the change of all logits over their norm beside the adapters.
    """

    model: PreTrainedModel
    changed_codes: dict[str, float]
    logits_change: float


def merge_adapters(model: nn.Module, *, input_ids: Tensor | None = None) -> AdapterMerge:
    """Merge the adapters of a peft model into its master weights, and measure what that changes.

    Beside a ternary linear an adapter adds B A x to the product; merged, W + B A is quantised anew,
    and most of B A is rounded away or changes codes: another model. What changed is measured, and
    told in the log at WARNING.

    Args:
        model: a ``peft.PeftModel`` with adapters beside ``BitLinear``; it is used up, as by peft's
            ``merge_and_unload``.
        input_ids: int64 [B T], text to compare logits on. Default: 64 random tokens.

    Returns:
        The merged model and the figures.

    Raises:
        ImportError: peft is not installed.
        TypeError: ``model`` is no peft model.
        ValueError: no ternary linear has an adapter, or adapters are merged already.
    """
    layers = dict(_adapted(model))
    if not layers:
        raise ValueError("`model`: expected adapters beside BitLinear layers, got none")
    codes = {name: _codes(layer) for name, layer in layers.items()}
    peft_model: Any = model
    if input_ids is None:
        vocabulary = peft_model.get_base_model().config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(vocabulary, (1, _RANDOM_TOKENS), generator=generator)
    before = _logits(model, input_ids)
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


def _adapted(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """Return names and ternary linears that have adapters beside them."""
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
        if isinstance(layer, BitLinear):
            yield name, layer


def _codes(layer: BitLinear) -> Tensor:
    weight = layer.weight.detach()
    if layer.levels == "binary":
        return weight.float() > weight.float().mean()
    return quantize_weight(weight)[0]


@torch.no_grad()
def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the logits [B T vocabulary] in float32, without dropout."""
    was_training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    try:
        return model.eval()(input_ids=input_ids.to(device), use_cache=False)[0].float()
    finally:
        for module in was_training:
            module.training = True
