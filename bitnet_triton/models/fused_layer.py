"""The decoder layer of a fused BitNet model: six kernels and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import transformers.models.bitnet.modeling_bitnet as hf
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitnet_triton.kernels import flash_attention
from bitnet_triton.kernels.rms_norm.quantized import (
    NORM_QUANTIZE_FWD,
    RELU2_FWD,
    relu2_mul_norm_quantize_rows,
    rms_norm_quantize_rows,
)
from bitnet_triton.kernels.rotary.op import ROTARY
from bitnet_triton.kernels.ternary_linear.launchers import QUANTIZED_FWD
from bitnet_triton.kernels.ternary_linear.quantized import ternary_linear_quantized_rows
from bitnet_triton.nn import MergedLinears, PackedBitLinear
from bitnet_triton.runtime import backend_objection, forced_backend, select
from bitnet_triton.runtime.device import autocast_dtype, smallest_dot

_CAPTURES_OUTPUTS = "transformers.utils.output_capturing"


def _merged(*layers: nn.Module) -> MergedLinears:
    return MergedLinears(*cast("tuple[PackedBitLinear, ...]", layers))


# Attention functions of transformers that show a token everything before it, and nothing else
DENSE_ATTENTION = frozenset({"eager", "sdpa"})


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings [B T D] to x [B T H D], with the roundings of transformers."""
    return x * cos.unsqueeze(2) + hf.rotate_half(x) * sin.unsqueeze(2)


class Launchers(NamedTuple):
    """What runs the steps of a layer."""

    norm_quantize: Callable[..., tuple[Tensor, Tensor, Tensor]]
    relu2: Callable[..., tuple[Tensor, Tensor, Tensor]]
    product: Callable[..., Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = _rotate
    # in place of dense attention of transformers; None: that one
    attention: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None


# PyTorch's operations in the last places: a compiler fuses them with what stands around them
_REGISTERED = Launchers(
    rms_norm_quantize_rows, relu2_mul_norm_quantize_rows, ternary_linear_quantized_rows
)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return cast("Tensor", flash_attention(q, k, v, scale=scale))


def _own_attention(device: torch.device) -> Callable[..., Tensor] | None:
    """Return our attention where it is the faster one: PyTorch's has kernels for GPUs only."""
    has_kernels = backend_objection("triton", device) is None and smallest_dot(device) == 1
    return _attend_causally if has_kernels and forced_backend() in (None, "triton") else None


class Norm:
    """A norm as the kernels read it."""

    def __init__(self, norm: hf.BitNetRMSNorm) -> None:
        self._parameters = norm._parameters
        self.eps = norm.variance_epsilon

    @property
    def weight(self) -> Tensor:
        """The scales of the norm."""
        return cast("Tensor", self._parameters["weight"])


class Fusion:
    """What the forward of a fused layer looks up, and whether it may run."""

    def __init__(self, layer: hf.BitNetDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention = attention
        self._kind = type(attention)
        self.qkv = _merged(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = _merged(attention.o_proj)
        self.gate_up = _merged(mlp.gate_proj, mlp.up_proj)
        self.down = _merged(mlp.down_proj)
        self.input_norm = Norm(layer.input_layernorm)
        self.attention_norm = Norm(attention.attn_sub_norm)
        self.mlp_norm = Norm(layer.post_attention_layernorm)
        self.down_norm = Norm(mlp.ffn_sub_norm)
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
        self._launchers: dict[Any, Launchers] = {}

    def launchers(
        self, layer: hf.BitNetDecoderLayer, x: Tensor, kwargs: dict[str, Any]
    ) -> Launchers | None:
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

    def run(self, run: Launchers, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Map x [M, D] to [M, D]; ``attend`` maps the product with q, k and v to heads [M, H D]."""
        dtype = x.dtype

        def normalise(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
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

        attended = attend(multiply(normalise(x, self.input_norm), self.qkv))
        x = multiply(normalise(attended, self.attention_norm), self.o, residual=x)
        gate_up = multiply(normalise(x, self.mlp_norm), self.gate_up)
        quantized = run.relu2(gate_up, self.down_norm.weight, self.down_norm.eps)
        return multiply(quantized, self.down, residual=x)

    def __getstate__(self) -> dict[str, Any]:
        # launchers are chosen again by whoever reads it
        return {**self.__dict__, "_launchers": {}}

    def merge(self) -> None:
        """Merge anew what no longer lies in one matrix, so that no forward has to."""
        for linears in (self.qkv, self.o, self.gate_up, self.down):
            linears.weight()

    def addresses(self) -> list[int]:
        """Return where the weights are that a forward reads."""
        weights = [part.weight() for part in (self.qkv, self.o, self.gate_up, self.down)]
        norms = (self.input_norm, self.attention_norm, self.mlp_norm, self.down_norm)
        return [
            *(t.data_ptr() for weight in weights for t in (weight.packed, weight.scale)),
            *(norm.weight.data_ptr() for norm in norms),
        ]

    def _has_other_parts(self) -> bool:
        if type(self.attention) is not self._kind:
            return True
        # a loop: any() over a generator takes twice as long
        for modules, name, child in self._children:  # noqa: SIM110
            if modules[name] is not child:
                return True
        return False

    def _choose(self, key: Any, device: torch.device) -> Launchers:
        norm, relu2 = self.input_norm.weight, self.down_norm.weight
        chosen = Launchers(
            select("rms_norm_quantize", NORM_QUANTIZE_FWD, device, norm),
            select("relu2_mul_norm_quantize", RELU2_FWD, device, relu2),
            select("ternary_linear_quantized", QUANTIZED_FWD, device),
            self._rotation(device),
            _own_attention(device),
        )
        self._launchers[key] = chosen
        return chosen

    def _rotation(self, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        rotate = select("rotary", ROTARY, device)
        return lambda x, cos, sin: rotate(x, cos, sin, False)

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

    fusion: Fusion

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedDecoderLayer:
        super()._apply(fn, recurse)
        self.fusion.merge()  # each part has moved by itself
        return self

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

        def attend(qkv: Tensor) -> Tensor:
            return self._attend(
                run, qkv.view(B, T, -1, fusion.attention.head_dim), position_embeddings,
                attention_mask, past_key_values, position_ids=position_ids, use_cache=use_cache,
                **kwargs,
            ).reshape(B * T, -1)  # fmt: skip

        return fusion.run(run, hidden_states.reshape(-1, D), attend).view(B, T, D)

    def _attend(
        self,
        run: Launchers,
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
        rotated = run.rotate(heads[:, :, : H + Hk], *position_embeddings).transpose(1, 2)
        query, key = rotated[:, :H], rotated[:, H:]
        value = heads[:, :, H + Hk :].transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        implementation = attention.config._attn_implementation
        if run.attention and attention_mask is None and implementation in DENSE_ATTENTION:
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return run.attention(q, k, v, attention.scaling)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, hf.eager_attention_forward)
        return attend(
            attention, query, key, value, attention_mask,
            dropout=0.0, scaling=attention.scaling, **kwargs,
        )[0]  # fmt: skip
