"""What a fused decoder layer runs: six kernels and attention, for two architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.modules.module as every_module
import transformers.models.bitnet.modeling_bitnet as bitnet
import transformers.models.llama.modeling_llama as llama
from torch import Tensor, nn

from bitnet_triton.kernels import flash_attention
from bitnet_triton.kernels.quantize.op import ACTIVATIONS_SUMS_FWD, quantize_rows_with_sums
from bitnet_triton.kernels.rms_norm.quantized import (
    NORM_QUANTIZE_FWD,
    RELU2_FWD,
    SILU_FWD,
    Quantized,
    relu2_mul_norm_quantize_rows,
    rms_norm_quantize_rows,
    silu_mul_quantize_rows,
)
from bitnet_triton.kernels.rotary.op import ROTARY
from bitnet_triton.kernels.ternary_linear.launchers import QUANTIZED_FWD
from bitnet_triton.kernels.ternary_linear.quantized import ternary_linear_quantized_rows
from bitnet_triton.nn import MergedLinears, PackedBitLinear
from bitnet_triton.runtime import backend_objection, forced_backend, select
from bitnet_triton.runtime.device import autocast_dtype, smallest_dot

_CAPTURES_OUTPUTS = "transformers.utils.output_capturing"


class Architecture(NamedTuple):
    """In what the decoder layers of two model families differ, for a fusion."""

    layer: type[nn.Module]
    attention: type[nn.Module]
    # of the gate, as configs name it, and the kernel that multiplies it with up
    activation: str
    gate_kernel: str
    # in front of the two linears that end a branch
    has_sub_norms: bool


BITNET = Architecture(
    bitnet.BitNetDecoderLayer, bitnet.BitNetAttention, "relu2", "relu2_mul_norm_quantize_fwd", True
)
LLAMA = Architecture(
    llama.LlamaDecoderLayer, llama.LlamaAttention, "silu", "silu_mul_quantize_fwd", False
)


def _merged(*layers: nn.Module) -> MergedLinears:
    return MergedLinears(*cast("tuple[PackedBitLinear, ...]", layers))


# Attention functions of transformers that show a token everything before it, and nothing else
DENSE_ATTENTION = frozenset({"eager", "sdpa"})


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings [B T D] to x [B T H D], with the roundings of transformers."""
    return x * cos.unsqueeze(2) + bitnet.rotate_half(x) * sin.unsqueeze(2)


class Launchers(NamedTuple):
    """What runs the steps of a layer; an architecture uses one of each pair."""

    norm_quantize: Callable[..., Quantized]
    product: Callable[..., Tensor]
    quantize: Callable[..., Quantized] = quantize_rows_with_sums
    relu2: Callable[..., Quantized] = relu2_mul_norm_quantize_rows
    silu: Callable[..., Quantized] = silu_mul_quantize_rows
    # PyTorch's operations here: a compiler fuses them with what stands around them
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = _rotate
    # in place of dense attention of transformers; None: that one
    attention: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None


_REGISTERED = Launchers(rms_norm_quantize_rows, ternary_linear_quantized_rows)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return cast("Tensor", flash_attention(q, k, v, scale=scale))


def _own_attention(device: torch.device) -> Callable[..., Tensor] | None:
    """Return our attention where it is the faster one: PyTorch's has kernels for GPUs only."""
    has_kernels = backend_objection("triton", device) is None and smallest_dot(device) == 1
    return _attend_causally if has_kernels and forced_backend() in (None, "triton") else None


class Norm:
    """A norm as the kernels read it."""

    def __init__(self, norm: Any) -> None:
        self._parameters = norm._parameters
        self.eps = norm.variance_epsilon

    @property
    def weight(self) -> Tensor:
        """The scales of the norm."""
        return cast("Tensor", self._parameters["weight"])


class Fusion:
    """What the forward of a fused layer looks up, and whether it may run."""

    def __init__(self, layer: Any, architecture: Architecture) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.architecture = architecture
        self.attention = attention
        self._kind = type(attention)
        self.qkv = _merged(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = _merged(attention.o_proj)
        self.gate_up = _merged(mlp.gate_proj, mlp.up_proj)
        self.down = _merged(mlp.down_proj)
        self.input_norm = Norm(layer.input_layernorm)
        self.mlp_norm = Norm(layer.post_attention_layernorm)
        self.attention_norm = self.down_norm = None
        if architecture.has_sub_norms:
            self.attention_norm = Norm(attention.attn_sub_norm)
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

    def launchers(self, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Launchers | None:
        """Return what a fused forward runs; None where the layer's own forward has to."""
        if (
            torch.is_grad_enabled()
            or x.numel() == 0
            or autocast_dtype(x.device.type) is not None
            or not self.stands_for(layer, x.dtype, kwargs)
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

    def stands_for(self, layer: nn.Module, dtype: torch.dtype, kwargs: dict[str, Any]) -> bool:
        """Tell whether a layer, as it is now, computes what was fused; ``launchers`` asks too."""
        return not (
            layer.training
            or dtype != self.input_norm.weight.dtype
            or self._has_other_parts()
            or has_global_hooks()
            or (any(self._hooks) and self._is_watched(kwargs))
        )

    def run(self, run: Launchers, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Map x [M, D] to [M, D]; ``attend`` maps the product with q, k and v to heads [M, H D]."""
        dtype = x.dtype

        def quantize(x: Tensor, norm: Norm | None) -> Quantized:
            if norm is None:
                return run.quantize(x)
            return run.norm_quantize(x, norm.weight, norm.eps)

        def multiply(
            quantized: Quantized, linears: MergedLinears, residual: Tensor | None = None
        ) -> Tensor:
            weight = linears.weight()
            return run.product(
                *quantized, weight.packed, weight.scale, residual, weight.rows, dtype
            )

        attended = attend(multiply(quantize(x, self.input_norm), self.qkv))
        x = multiply(quantize(attended, self.attention_norm), self.o, residual=x)
        gate_up = multiply(quantize(x, self.mlp_norm), self.gate_up)
        return multiply(self._activate(run, gate_up), self.down, residual=x)

    def _activate(self, run: Launchers, gate_up: Tensor) -> Quantized:
        norm = self.down_norm
        return run.silu(gate_up) if norm is None else run.relu2(gate_up, norm.weight, norm.eps)

    def __getstate__(self) -> dict[str, Any]:
        # launchers are chosen again by whoever reads it
        return {**self.__dict__, "_launchers": {}}

    def merge(self) -> None:
        """Merge anew what no longer lies in one matrix, so that no forward has to."""
        for linears in (self.qkv, self.o, self.gate_up, self.down):
            linears.weight()

    def weights(self) -> tuple[list[Any], list[int]]:
        """Return the weights that a forward reads; and the addresses of those that may move."""
        norms = (self.input_norm, self.attention_norm, self.mlp_norm, self.down_norm)
        scales = [norm.weight for norm in norms if norm is not None]
        merged = [part.weight() for part in (self.qkv, self.o, self.gate_up, self.down)]
        return [*merged, *scales], [scale.data_ptr() for scale in scales]

    def _has_other_parts(self) -> bool:
        if type(self.attention) is not self._kind:
            return True
        # a loop: any() over a generator takes twice as long
        for modules, name, child in self._children:
            if modules[name] is not child or "forward" in child.__dict__:
                return True
        return False

    def _choose(self, key: Any, device: torch.device) -> Launchers:
        chosen = Launchers(
            select("rms_norm_quantize", NORM_QUANTIZE_FWD, device, self.input_norm.weight),
            select("ternary_linear_quantized", QUANTIZED_FWD, device),
            rotate=self._rotation(device),
            attention=_own_attention(device),
        )
        if self.down_norm is not None:
            relu2 = select("relu2_mul_norm_quantize", RELU2_FWD, device, self.down_norm.weight)
            chosen = chosen._replace(relu2=relu2)
        else:
            _, K = self.o.weight().packed.shape
            like = self.input_norm.weight.new_empty((1, K), device="meta")
            F = self.gate_up.weight().shape[0] // 2
            chosen = chosen._replace(
                quantize=select("quantize_activations_sums", ACTIVATIONS_SUMS_FWD, device, like),
                silu=select("silu_mul_quantize", SILU_FWD, device, F),
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


def has_global_hooks() -> bool:
    """Tell whether somebody watches every module there is."""
    return bool(every_module._global_forward_hooks or every_module._global_forward_pre_hooks)


def is_changed(module: nn.Module) -> bool:
    """Tell whether calling a module does more than its class says, but for collecting outputs."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return "forward" in module.__dict__ or not all(
        _only_captures(hook) for watching in hooks for hook in watching.values()
    )


def _only_captures(hook: Any) -> bool:
    """Tell whether a hook is one by which transformers collects outputs that are asked for."""
    return getattr(hook, "__module__", None) == _CAPTURES_OUTPUTS
