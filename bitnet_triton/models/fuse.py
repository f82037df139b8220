"""fuse(model): decoder layers of a ternary model as few kernels, for inference."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn

from bitnet_triton.models.fused.fusion import Fusion, layer_objection
from bitnet_triton.models.fused.layer import FusedDecoderLayer, fused_class
from bitnet_triton.models.fused.model import FUSED_MODELS, FusedModel
from bitnet_triton.models.fused.step import DecodeSteps

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("bitnet_triton")


def fuse(model: Model) -> Model:
    """Run the decoder layers of a ternary model as few kernels, in place, for inference.

    Each norm quantises its output, queries, keys and values are one product, gate and up another,
    and the residuals are added where the products are stored. Used in ``eval()`` without
    gradients; any other forward is the layer's own, and so is one under autocast, with hooks on
    parts of a layer, with parts that were replaced (adapters) or on the backend ``compile``. The
    parameters, ``state_dict`` and ``save_pretrained`` stay as they are; merged weights are one
    tensor in whose memory those of the linears lie, each with a storage of its own. The attention
    implementation and the cache are those of the model. On a CPU the layers of a decode step are
    recorded once and replayed without Python (``models/fused``).

    Args:
        model: of the architecture BitNet or Llama with packed linears: ``BitNetForCausalLM`` of
            this package, or one of transformers after ``use_ternary_kernels``.

    Returns:
        The same model. ``unfuse`` undoes it. A second call reads all layers again: for changes
        that nothing notices (``models/fused/changes.py`` says what is noticed, and when).

    Raises:
        ValueError: the model has no decoder layer of these architectures, or a layer cannot be
            fused: its linears are not packed, have a bias or a norm of their own, its activation is
            not the architecture's, its rows are longer than the kernels take, or its weights are
            offloaded. Nothing was changed then.
    """
    objection = _objection_to_model(model)
    if objection is not None:
        raise ValueError(f"`model`: {objection}")
    for _, layer, kind in _decoder_layers(model):
        if isinstance(layer, FusedDecoderLayer):
            layer.fusion.read(layer)
        else:
            _fuse_layer(layer, kind)
    for module in model.children():
        _fuse_model(module)
    return model


def fuse_after_loading(model: Model) -> Model:
    """Fuse a model that was loaded for inference; say why where that cannot be, and go on.

    Args:
        model: any model; one that cannot be fused stays as it is.

    Returns:
        The same model.
    """
    objection = _objection_to_model(model)
    if objection is None:
        return fuse(model)
    logger.info("%s runs its layers module by module: %s", type(model).__name__, objection)
    return model


def unfuse(model: Model) -> Model:
    """Give the decoder layers that ``fuse`` changed their own forward back, in place.

    Weights get memory of their own again, and that of the merged ones is let go.

    Args:
        model: any model; layers that are not fused stay as they are.

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module, FusedDecoderLayer):
            module.fusion.release()
            del module.fusion
            cast("Any", module).__class__ = module.architecture.layer
        elif isinstance(module, FusedModel):
            del module.decode_steps
            kinds = {fused: kind for kind, fused in FUSED_MODELS.items()}
            cast("Any", module).__class__ = kinds[type(module)]
    return model


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Let layers be their own inside of the block, and fused again behind it, if they were."""
    was_fused = any(isinstance(module, FusedDecoderLayer) for module in model.modules())
    unfuse(model)
    try:
        yield
    finally:
        if was_fused:
            fuse_after_loading(model)


def _decoder_layers(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, type[FusedDecoderLayer]]]:
    """Return names, decoder layers, and the classes that they have or get when they are fused."""
    for name, module in model.named_modules():
        kind = fused_class(module)
        if kind is not None:
            yield name, module, kind


def _objection_to_model(model: nn.Module) -> str | None:
    """Say why a model cannot be fused; None when it can."""
    if getattr(getattr(model, "config", None), "reversible", False):
        return "reversible layers have two streams in float32, and no kernels that add to them"
    layers = list(_decoder_layers(model))
    if not layers:
        return (
            "expected decoder layers of the architecture BitNet or Llama, got "
            f"{type(model).__name__} without any"
        )
    for name, layer, kind in layers:
        objection = layer_objection(layer, kind.architecture)
        if objection is not None:
            return f"layer {name}: {objection}"
    return None


def _fuse_layer(layer: nn.Module, kind: type[FusedDecoderLayer]) -> None:
    fusion = Fusion(layer, kind.architecture)
    # another class, not another forward on the instance: copies and compilers follow classes
    fused = cast("FusedDecoderLayer", layer)
    cast("Any", fused).__class__ = kind
    fused.fusion = fusion


def _fuse_model(module: nn.Module) -> None:
    # not the whole model that the user holds: its class names the architecture of a checkpoint
    for part in module.modules():
        kind = FUSED_MODELS.get(type(part))
        if isinstance(part, FusedModel):
            part.decode_steps = DecodeSteps()
        elif kind is not None:
            introduce(cast("Any", kind))
            fused = cast("FusedModel", part)
            cast("Any", fused).__class__ = kind
            fused.decode_steps = DecodeSteps()


@functools.cache
def introduce(kind: Any) -> None:
    """Let transformers know the class of a decoder that a module gets later on.

    What can be captured (``output_hidden_states``), transformers notes by class when one is built.
    """
    with torch.device("meta"):
        kind(
            kind.config_class(
                vocab_size=1, hidden_size=2, intermediate_size=1, num_hidden_layers=0,
                num_attention_heads=1, num_key_value_heads=1,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip
