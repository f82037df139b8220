"""Another attention for a model that is there: with other modes, and what they bring along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

from torch import nn

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.attention.mode import Mode
from bitnet_triton.models.fuse import unfused

Model = TypeVar("Model", bound=nn.Module)


def set_attention(model: Model, attention: str | Mapping[str, Any]) -> Model:
    """Give a model other attention modes, in place.

    Parameters that the new modes bring are added, at their start; those of former modes go. The
    model is saved with them, and ``config.attention`` says so. A cache of the former modes is no
    longer one for this model. Fused layers stay fused where they can.

    Args:
        model: ``BitNetForCausalLM`` or ``BitNetModel``.
        attention: as ``config.attention`` takes it.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is of another class, or ``attention`` of a wrong type.
        ValueError: a mode, a preset or a setting is unknown or does not fit the model or its
            ``config.cache``. Nothing was changed then.
    """
    config = getattr(model, "config", None)
    if not hasattr(model, "use_plan") or config is None:
        raise TypeError(
            f"`model`: expected BitNetForCausalLM or BitNetModel, got {type(model).__name__}"
        )
    plan = AttentionPlan.from_config(
        attention, config.num_hidden_layers, getattr(config, "cache", None)
    )
    plan.check_layers(config.num_hidden_layers)
    with unfused(model):
        cast("Any", model).use_plan(plan)
    return model


def set_cache(model: Model, cache: str | Mapping[str, Any] | None) -> Model:
    """Give a model another memory for keys and values, in place.

    The model is saved with it, and ``config.cache`` says so. A model without ``config.attention``
    gets "full".

    Args:
        model: ``BitNetForCausalLM`` or ``BitNetModel``.
        cache: as ``config.cache`` takes it; None: the plain one.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is of another class, or ``cache`` of a wrong type.
        ValueError: the memory or a setting is unknown, or does not go with the attention of the
            model. Nothing was changed then.
    """
    config = getattr(model, "config", None)
    if not hasattr(model, "use_plan") or config is None:
        raise TypeError(
            f"`model`: expected BitNetForCausalLM or BitNetModel, got {type(model).__name__}"
        )
    if cache is None and config.cache is None:
        return model
    layers = config.num_hidden_layers
    plan = AttentionPlan.from_config(config.attention or "full", layers, cache)
    plan.check_layers(layers)
    with unfused(model):
        cast("Any", model).use_plan(plan)
    return model


def add_global_projections(model: Model) -> Model:
    """Give global tokens projections of their own, copies of the others at first, in place.

    A model that was trained without them computes the same as before; then they can be trained.
    They are saved with the model, and ``config.attention`` says that they are there.

    Args:
        model: ``BitNetForCausalLM`` or ``BitNetModel`` with attention "longformer" in some layer.

    Returns:
        The same model; a second call changes nothing.

    Raises:
        ValueError: no layer has global tokens.
    """
    plan: AttentionPlan | None = getattr(model, "attention_plan", None)
    if plan is None or not any(hasattr(mode, "global_projections") for mode in plan):
        raise ValueError("`model`: expected attention 'longformer' in `config.attention`")
    phases = (tuple(map(_with_projections, phase)) for phase in (plan.prefill, plan.decode))
    wanted = AttentionPlan(*phases, cache=plan.cache)
    if not any(getattr(mode, "global_projections", False) for mode in wanted):
        raise ValueError("`model`: expected a layer with 'global_tokens' or 'global_mask'")
    return model if wanted == plan else set_attention(model, wanted.to_config())


def _with_projections(mode: Mode) -> Mode:
    settings = cast("Any", mode)
    if hasattr(mode, "global_projections") and (settings.global_tokens or settings.global_mask):
        return replace(settings, global_projections=True)
    return mode
