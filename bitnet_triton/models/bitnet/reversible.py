"""A decoder of reversible layers (arXiv:2001.04451, section 3): attention and MLP on two streams.

``y1 = x1 + attention(x2)``, ``y2 = x2 + mlp(y1)``, and the mean of both streams behind the last
layer. A layer has the parameters that it has otherwise, under the same names.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers.models.bitnet.modeling_bitnet as hf
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from bitnet_triton.models.fused.fusion import is_changed
from bitnet_triton.nn import run_reversible

logger = logging.getLogger("bitnet_triton")

_CAPTURED = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True, eq=False)
class _Branch:
    """A norm and what follows it, in the dtype of the norm; what it adds to a stream."""

    norm: nn.Module
    module: nn.Module
    arguments: dict[str, Any]

    def __call__(self, x: Tensor, /) -> Tensor:
        weight = self.norm.weight
        assert isinstance(weight, Tensor)
        out = self.module(self.norm(x.to(weight.dtype)), **self.arguments)
        return out[0] if isinstance(out, tuple) else out

    def parameters(self) -> Iterator[nn.Parameter]:
        return itertools.chain(self.norm.parameters(), self.module.parameters())


class ReversibleDecoderLayer(hf.BitNetDecoderLayer):
    """transformers' decoder layer with its attention and its MLP on two streams."""

    def forward(  # type: ignore[override]  # two streams
        self, x1: Tensor, x2: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map both streams [B T D]; their mean, in the dtype of the model, comes before them."""
        attention, mlp = self.branches(kwargs)
        y1 = _wide(x1) + attention(x2)
        y2 = _wide(x2) + mlp(y1)
        return self.joined(y1, y2), y1, y2

    def branches(self, arguments: dict[str, Any]) -> tuple[_Branch, _Branch]:
        """Return attention, which is called with ``arguments``, and MLP, each with its norm."""
        return (
            _Branch(self.input_layernorm, self.self_attn, arguments),
            _Branch(self.post_attention_layernorm, self.mlp, {}),
        )

    def joined(self, y1: Tensor, y2: Tensor) -> Tensor:
        """Return the mean of both streams."""
        return ((y1 + y2) / 2).to(self.input_layernorm.weight.dtype)


def make_reversible(model: Any) -> None:
    """Let the layers of a model, or of a decoder, run on two streams."""
    for layer in model.base_model.layers:
        layer.__class__ = ReversibleDecoderLayer
    for part in (model, model.base_model):
        part._no_split_modules = [ReversibleDecoderLayer.__name__]  # what to shard by


def check_no_cache(config: Any, cache: Cache | None, use_cache: bool | None) -> None:
    """Raise where a model of reversible layers is to remember something.

    Raises:
        ValueError: there is a cache, or one is wanted.
    """
    wanted = config.use_cache if use_cache is None else use_cache
    if config.reversible and (cache is not None or wanted):
        name = "use_cache" if cache is None else "past_key_values"
        raise ValueError(
            f"`{name}`: reversible layers make their inputs again of their outputs and go without "
            "a cache; expected use_cache=False"
        )


@merge_with_config_defaults
@capture_outputs
def run_decoder(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """Do what the forward of transformers' decoder does, without a cache."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("`input_ids`: expected either them or `inputs_embeds`")
    x = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if position_ids is None:
        position_ids = torch.arange(x.shape[1], device=x.device)[None]
    mask = create_causal_mask(
        config=model.config, inputs_embeds=x, attention_mask=attention_mask,
        past_key_values=None, position_ids=position_ids,
    )  # fmt: skip
    arguments = {
        **kwargs,
        "attention_mask": mask,
        "position_ids": position_ids,
        "position_embeddings": model.rotary_emb(x, position_ids=position_ids),
    }
    layers = model.layers[: model.config.num_hidden_layers]
    if _keeps_activations(model.config, layers, kwargs):
        hidden = y1 = y2 = x
        for layer in layers:
            hidden, y1, y2 = layer(y1, y2, **arguments)
    else:
        y1, y2 = run_reversible([layer.branches(arguments) for layer in layers], *[_wide(x)] * 2)
        hidden = layers[0].joined(y1, y2) if len(layers) else x
    return BaseModelOutputWithPast(last_hidden_state=model.norm(hidden))


def _keeps_activations(config: Any, layers: Any, kwargs: dict[str, Any]) -> bool:
    """Tell whether layers are called one by one: what comes out of each of them is wanted."""
    if any(kwargs.get(name, getattr(config, name, False)) for name in _CAPTURED):
        return True
    if torch.compiler.is_compiling() or not any(map(is_changed, layers)):
        return not torch.is_grad_enabled()
    if torch.is_grad_enabled():
        _tell_hooks()
    return True


@functools.cache
def _tell_hooks() -> None:
    logger.warning(
        "reversible layers have hooks or a forward of their own, and keep their activations: what "
        "is seen of a layer would not be what its gradient goes through"
    )


def _wide(x: Tensor) -> Tensor:
    """Return a stream that subtraction leads back: narrow sums are rounded too much."""
    return x if x.dtype == torch.float64 else x.float()
