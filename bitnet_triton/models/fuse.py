"""fuse(model): decoder layers of a BitNet model as few kernels, for inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
import transformers.models.bitnet.modeling_bitnet as hf
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitnet_triton.kernels.rms_norm.op import (
    NORM_QUANTIZE_FWD,
    RELU2_FWD,
    relu2_mul_norm_quantize_rows,
    rms_norm_quantize_rows,
)
from bitnet_triton.kernels.ternary_linear.launchers import QUANTIZED_FWD
from bitnet_triton.kernels.ternary_linear.quantized import ternary_linear_quantized_rows
from bitnet_triton.nn import MergedLinears, PackedBitLinear
from bitnet_triton.runtime import forced_backend, select
from bitnet_triton.runtime.device import autocast_dtype

Model = TypeVar("Model", bound=nn.Module)

_CAPTURES_OUTPUTS = "transformers.utils.output_capturing"


def fuse(model: Model) -> Model:
    """Run the decoder layers of a BitNet model as few kernels, in place, for inference.

    Each norm quantises its output, queries, keys and values are one product, gate and up another,
    and the residuals are added where the products are stored. Used in ``eval()`` without
    gradients; any other forward is the layer's own, and so is one under autocast, with hooks on
    parts of a layer, with parts that were replaced (adapters) or on the backend ``compile``. The
    parameters, ``state_dict`` and ``save_pretrained`` stay as they are; merged weights are one
    tensor of which the linears hold views. The attention implementation and the cache are those of
    the model.

    Args:
        model: of the BitNet architecture with packed linears: ``BitNetForCausalLM`` of this
            package, or transformers' after ``use_ternary_kernels``.

    Returns:
        The same model. ``unfuse`` undoes it; a second call changes nothing.

    Raises:
        ValueError: the model has no BitNet decoder layer, or a layer cannot be fused: its linears
            are not packed, have a bias or a norm of their own, its activation is not ``relu2``, or
            its weights are offloaded. Nothing was changed then.
    """
    layers = dict(_decoder_layers(model))
    if not layers:
        raise ValueError(
            "`model`: expected decoder layers of the BitNet architecture, got "
            f"{type(model).__name__} without any; Llama-style models stay as they are"
        )
    for name, layer in layers.items():
        objection = _objection(layer)
        if objection is not None:
            raise ValueError(f"`model`: layer {name}: {objection}")
    for layer in layers.values():
        if not isinstance(layer, FusedDecoderLayer):
            _fuse_layer(layer)
    return model


def unfuse(model: Model) -> Model:
    """Give the decoder layers that ``fuse`` changed their own forward back, in place.

    Args:
        model: any model; layers that are not fused stay as they are.

    Returns:
        The same model.
    """
    for module in model.modules():
        if isinstance(module, FusedDecoderLayer):
            del module.fusion
            cast("Any", module).__class__ = hf.BitNetDecoderLayer
    return model


def _decoder_layers(model: nn.Module) -> Iterator[tuple[str, hf.BitNetDecoderLayer]]:
    for name, module in model.named_modules():
        if type(module) in (hf.BitNetDecoderLayer, FusedDecoderLayer):
            yield name, cast("hf.BitNetDecoderLayer", module)


def _objection(layer: hf.BitNetDecoderLayer) -> str | None:
    """Say why a layer cannot be fused; None when it can."""
    if any(hasattr(module, "_hf_hook") for module in layer.modules()):
        return "accelerate moves its weights or inputs; load the model onto one device"
    for name, linear in _linears(layer):
        if not isinstance(linear, PackedBitLinear):
            return f"{name}: expected packed ternary weights, got {type(linear).__name__}"
        if linear.bias is not None:
            return f"{name}: a linear with a bias cannot be fused yet"
        if linear.rms_norm is not None:
            return f"{name}: a linear with a norm of its own cannot be fused yet"
        if linear.weight.device.type == "meta":
            return f"{name}: its weight is not loaded"
    if layer.mlp.config.hidden_act != "relu2":
        return f"mlp: expected the activation relu2, got {layer.mlp.config.hidden_act}"
    return None


def _linears(layer: hf.BitNetDecoderLayer) -> Iterator[tuple[str, nn.Module]]:
    for parent in ("self_attn", "mlp"):
        for name, module in layer.get_submodule(parent).named_children():
            if name.endswith("_proj"):
                yield f"{parent}.{name}", module


def _fuse_layer(layer: hf.BitNetDecoderLayer) -> None:
    fusion = _Fusion(layer)
    # another class, not another forward on the instance: copies and compilers follow classes
    fused = cast("FusedDecoderLayer", layer)
    cast("Any", fused).__class__ = FusedDecoderLayer
    fused.fusion = fusion


def _merged(*layers: nn.Module) -> MergedLinears:
    return MergedLinears(*cast("tuple[PackedBitLinear, ...]", layers))


class _Launchers(NamedTuple):
    """What runs the steps of a layer."""

    norm_quantize: Callable[..., tuple[Tensor, Tensor, Tensor]]
    relu2: Callable[..., tuple[Tensor, Tensor, Tensor]]
    product: Callable[..., Tensor]


_REGISTERED = _Launchers(
    rms_norm_quantize_rows, relu2_mul_norm_quantize_rows, ternary_linear_quantized_rows
)


class _Norm:
    """A norm as the kernels read it."""

    def __init__(self, norm: hf.BitNetRMSNorm) -> None:
        self._parameters = norm._parameters
        self.eps = norm.variance_epsilon

    @property
    def weight(self) -> Tensor:
        return cast("Tensor", self._parameters["weight"])


class _Fusion:
    """What the forward of a fused layer looks up, and whether it may run."""

    def __init__(self, layer: hf.BitNetDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention = attention
        self.qkv = _merged(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = _merged(attention.o_proj)
        self.gate_up = _merged(mlp.gate_proj, mlp.up_proj)
        self.down = _merged(mlp.down_proj)
        self.input_norm = _Norm(layer.input_layernorm)
        self.attention_norm = _Norm(attention.attn_sub_norm)
        self.mlp_norm = _Norm(layer.post_attention_layernorm)
        self.down_norm = _Norm(mlp.ffn_sub_norm)
        self.heads = attention.q_proj.out_features // attention.head_dim
        self.kv_heads = attention.k_proj.out_features // attention.head_dim
        # PyTorch changes these dictionaries, it does not replace them
        self._hooks = [
            hooks
            for module in layer.modules()
            if module is not layer
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self._children = [
            (module._modules, name, child)
            for module in layer.modules()
            for name, child in module._modules.items()
        ]
        self._launchers: dict[Any, _Launchers] = {}

    def launchers(
        self, layer: hf.BitNetDecoderLayer, x: Tensor, kwargs: dict[str, Any]
    ) -> _Launchers | None:
        """Return what a fused forward runs; None where the layer's own forward has to."""
        if (
            torch.is_grad_enabled()
            or layer.training
            or x.numel() == 0
            or x.dtype != self.input_norm.weight.dtype
            or autocast_dtype(x.device.type) is not None
            or self._has_other_parts()
            or (any(self._hooks) and self._is_watched(kwargs))
        ):
            return None
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return _REGISTERED  # a graph chooses its backend when it runs
        backend = forced_backend()
        if backend == "compile":
            return None
        # chosen once, not in every step of every layer
        key = backend, x.device
        return self._launchers.get(key) or self._choose(key, x.device)

    def _has_other_parts(self) -> bool:
        # a loop: any() over a generator takes twice as long
        for modules, name, child in self._children:  # noqa: SIM110
            if modules[name] is not child:
                return True
        return False

    def _choose(self, key: Any, device: torch.device) -> _Launchers:
        norm, relu2 = self.input_norm.weight, self.down_norm.weight
        chosen = _Launchers(
            select("rms_norm_quantize", NORM_QUANTIZE_FWD, device, norm),
            select("relu2_mul_norm_quantize", RELU2_FWD, device, relu2),
            select("ternary_linear_quantized", QUANTIZED_FWD, device),
        )
        self._launchers[key] = chosen
        return chosen

    def _is_watched(self, kwargs: dict[str, Any]) -> bool:
        """Tell whether somebody wants to see what happens inside of the layer."""
        if kwargs.get("output_attentions", self.attention.config.output_attentions):
            return True
        return not all(_only_captures(hook) for hooks in self._hooks for hook in hooks.values())


def _only_captures(hook: Any) -> bool:
    """Tell whether a hook is one by which transformers collects outputs that are asked for."""
    return getattr(hook, "__module__", None) == _CAPTURES_OUTPUTS


class FusedDecoderLayer(hf.BitNetDecoderLayer):
    """A decoder layer of transformers' BitNet after ``fuse``."""

    fusion: _Fusion

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map [B T D] to [B T D]."""
        fusion = self.fusion
        run = fusion.launchers(self, hidden_states, kwargs)
        if run is None:
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        assert position_embeddings is not None
        B, T, D = hidden_states.shape
        dtype = hidden_states.dtype

        def normalise(x: Tensor, norm: _Norm) -> tuple[Tensor, Tensor, Tensor]:
            return run.norm_quantize(x, norm.weight, norm.eps)

        def multiply(
            quantized: tuple[Tensor, Tensor, Tensor],
            linears: MergedLinears,
            residual: Tensor | None = None,
        ) -> Tensor:
            weight = linears.weight()
            return run.product(
                *quantized, weight.packed, weight.scale, residual, weight.rows, dtype
            )

        x = hidden_states.reshape(-1, D)
        qkv = multiply(normalise(x, fusion.input_norm), fusion.qkv)
        attended = self._attend(
            qkv.view(B, T, -1, fusion.attention.head_dim), position_embeddings, attention_mask,
            past_key_values, position_ids=position_ids, use_cache=use_cache, **kwargs,
        ).reshape(B * T, -1)  # fmt: skip
        x = multiply(normalise(attended, fusion.attention_norm), fusion.o, residual=x)
        gate_up = multiply(normalise(x, fusion.mlp_norm), fusion.gate_up)
        norm = fusion.down_norm
        quantized = run.relu2(gate_up, norm.weight, norm.eps)
        return multiply(quantized, fusion.down, residual=x).view(B, T, D)

    def _attend(
        self,
        heads: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Map ``heads`` [B T H + 2 Hk D], of queries, keys and values, to [B T H D]."""
        fusion = self.fusion
        attention, H, Hk = fusion.attention, fusion.heads, fusion.kv_heads
        # queries and keys turn alike: in one go
        rotated = _rotate(heads[:, :, : H + Hk], *position_embeddings).transpose(1, 2)
        query, key = rotated[:, :H], rotated[:, H:]
        value = heads[:, :, H + Hk :].transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, hf.eager_attention_forward
        )
        return attend(
            attention, query, key, value, attention_mask,
            dropout=0.0, scaling=attention.scaling, **kwargs,
        )[0]  # fmt: skip


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings [B T D] to x [B T H D], with the roundings of transformers."""
    return x * cos.unsqueeze(2) + hf.rotate_half(x) * sin.unsqueeze(2)
