"""The attention plan of a model as an attention function of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.full import Full
from bitnet_triton.attention.plan import AttentionPlan

NAME = "bitnet_triton"
_FULL = AttentionPlan((Full(),), (Full(),))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: query [B H Tq D], key and value [B Hk Tk D] -> [B Tq H D].

    The plan is the ``attention_plan`` of ``module``, its attention layer; full attention without.
    """
    phase = "decode" if query.shape[2] == 1 else "prefill"
    layer: int = module.layer_idx  # type: ignore[assignment]
    context = AttentionContext(
        layer=layer,
        phase=phase,
        mask=attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
    )
    mode = getattr(module, "attention_plan", _FULL).mode(layer, phase)
    return mode(*(t.transpose(1, 2) for t in (query, key, value)), context), None


def set_plan(model: nn.Module, plan: AttentionPlan) -> None:
    """Give every attention layer of ``model`` the plan that ``attend`` follows."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.attention_plan = plan  # type: ignore[assignment]


AttentionInterface.register(NAME, attend)
# without a mask function transformers passes no mask at all, and padding is read like text
AttentionMaskInterface.register(NAME, sdpa_mask)
