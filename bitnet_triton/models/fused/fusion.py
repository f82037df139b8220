"""What a fused decoder layer runs: six kernels and attention, for two architectures."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.modules.module as every_module
import transformers.models.bitnet.modeling_bitnet as bitnet
import transformers.models.llama.modeling_llama as llama
from torch import Tensor, nn

from bitnet_triton.kernels import flash_attention
from bitnet_triton.kernels.quantize.op import ACTIVATIONS_SUMS_FWD, quantize_rows_with_sums
from bitnet_triton.kernels.rms_norm.op import NORM_FWD
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
from bitnet_triton.models.fused.changes import Changes
from bitnet_triton.models.planned_attention import PlannedAttention
from bitnet_triton.nn import MergedLinears, PackedBitLinear, RMSNorm
from bitnet_triton.nn.divided import Part
from bitnet_triton.runtime import backend_objection, forced_backend, select
from bitnet_triton.runtime.autotune import largest_size
from bitnet_triton.runtime.device import autocast_dtype, smallest_dot

logger = logging.getLogger("bitnet_triton")

_CAPTURES_OUTPUTS = "transformers.utils.output_capturing"


class Architecture(NamedTuple):
    """In what the decoder layers of two model families differ, for a fusion."""

    layer: type[nn.Module]
    # transformers' own, and what this package makes of it
    attentions: tuple[type[nn.Module], ...]
    mlp: type[nn.Module]
    # of the gate, as configs name it, and the kernel that multiplies it with up
    activation: str
    gate_kernel: str
    # in front of the two linears that end a branch
    has_sub_norms: bool


BITNET = Architecture(
    bitnet.BitNetDecoderLayer, (bitnet.BitNetAttention, PlannedAttention), bitnet.BitNetMLP,
    "relu2", "relu2_mul_norm_quantize_fwd", True,
)  # fmt: skip
LLAMA = Architecture(
    llama.LlamaDecoderLayer, (llama.LlamaAttention,), llama.LlamaMLP,
    "silu", "silu_mul_quantize_fwd", False,
)  # fmt: skip
_NORMS = (RMSNorm, bitnet.BitNetRMSNorm, llama.LlamaRMSNorm)


def _merged(former: MergedLinears | None, *layers: nn.Module) -> MergedLinears:
    if former is not None and former.is_of(layers):
        return former  # it follows their weights by itself
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


def layer_objection(layer: Any, architecture: Architecture) -> str | None:
    """Say why a layer cannot be fused; None when it can."""
    if any(hasattr(module, "_hf_hook") for module in layer.modules()):
        return "accelerate moves its weights or inputs; load the model onto one device"
    if any(isinstance(module, Part) for module in layer.modules()):
        return "it is divided among processes, which tell each other values inside of it"
    for name, module in layer.named_modules():
        if module is not layer and "forward" in module.__dict__:
            return f"{name}: it has a forward of its own"
    return (
        _objection_to_classes(layer, architecture)
        or _objection_to_linears(layer)
        or _objection_to_sizes(layer, architecture)
    )


def _objection_to_classes(layer: Any, architecture: Architecture) -> str | None:
    kinds = {"self_attn": architecture.attentions, "mlp": (architecture.mlp,)}
    for name, wanted in kinds.items():
        found = type(layer.get_submodule(name))
        if found not in wanted:
            return f"{name}: expected {wanted[0].__name__} of transformers, got {found.__name__}"
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"] if architecture.has_sub_norms else []
    for name in norms:
        found = type(layer.get_submodule(name))
        if found not in _NORMS:
            return f"{name}: expected an RMS norm, got {found.__name__}"
    activation = layer.mlp.config.hidden_act
    if activation != architecture.activation:
        return f"mlp: expected the activation {architecture.activation}, got {activation}"
    return None


def _objection_to_linears(layer: nn.Module) -> str | None:
    for name, linear in _linears(layer):
        is_packed = isinstance(linear, PackedBitLinear)
        if hasattr(linear, "base_layer"):
            return f"{name}: it has adapters, which run beside it unless they are disabled"
        if not is_packed or type(linear).forward is not PackedBitLinear.forward:
            return f"{name}: expected packed ternary weights, got {type(linear).__name__}"
        if linear.bias is not None:
            return f"{name}: a linear with a bias cannot be fused yet"
        if linear.rms_norm is not None:
            return f"{name}: a linear with a norm of its own cannot be fused yet"
        if linear.weight.device.type == "meta":
            return f"{name}: its weight is not loaded"
    return None


def _objection_to_sizes(layer: nn.Module, architecture: Architecture) -> str | None:
    for name, kernel in (
        ("self_attn.q_proj", "rms_norm_quantize_fwd"),
        ("mlp.down_proj", architecture.gate_kernel),
    ):
        width, most = int(cast("Any", layer.get_submodule(name)).in_features), largest_size(kernel)
        if width > most:
            return f"{name}: its input has {width} values, a program holds at most {most}"
    return None


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for parent in ("self_attn", "mlp"):
        for name, module in layer.get_submodule(parent).named_children():
            if name.endswith("_proj"):
                yield f"{parent}.{name}", _base(module)


def _base(linear: Any) -> Any:
    """Return the linear below adapters of peft that are disabled: it is all that peft runs then."""
    while getattr(linear, "disable_adapters", False) and not linear.merged:
        linear = linear.base_layer
    return linear


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
    """What the forward of a fused layer looks up, and whether it may run.

    Attributes:
        objection: why the layer, as it is now, has to run its own forward; None: it has not.
    """

    qkv: MergedLinears
    o: MergedLinears
    gate_up: MergedLinears
    down: MergedLinears

    def __init__(self, layer: Any, architecture: Architecture) -> None:
        self.architecture = architecture
        self.read(layer)

    def read(self, layer: Any) -> None:
        """Look everything up anew: something in the layer has changed."""
        self.objection = layer_objection(layer, self.architecture)
        if self.objection is None:
            self._read_parts(layer)
        else:
            _tell_once(self.objection)
        self._is_hooked = any(
            module._forward_pre_hooks or module._forward_hooks
            for module in layer.modules()
            if module is not layer
        )
        self._hooks = [
            hooks
            for module in layer.modules()
            if module is not layer
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self._disabled = [m for m in layer.modules() if getattr(m, "disable_adapters", False)]
        self._launchers: dict[Any, Launchers] = {}
        self._changes: Changes | None = Changes(layer)

    def _read_parts(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention, former = attention, self.__dict__
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv = _merged(former.get("qkv"), *map(_base, qkv))
        self.o = _merged(former.get("o"), _base(attention.o_proj))
        self.gate_up = _merged(former.get("gate_up"), _base(mlp.gate_proj), _base(mlp.up_proj))
        self.down = _merged(former.get("down"), _base(mlp.down_proj))
        self.input_norm = Norm(layer.input_layernorm)
        self.mlp_norm = Norm(layer.post_attention_layernorm)
        self.attention_norm = self.down_norm = None
        if self.architecture.has_sub_norms:
            self.attention_norm = Norm(attention.attn_sub_norm)
            self.down_norm = Norm(mlp.ffn_sub_norm)
        self.heads = attention.q_proj.out_features // attention.head_dim
        self.kv_heads = attention.k_proj.out_features // attention.head_dim

    def launchers(self, layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Launchers | None:
        """Return what a fused forward runs; None where the layer's own forward has to.

        Args:
            layer: the layer.
            x: [B T D]; before a prompt, of more than one token, all of the layer is looked at.
            kwargs: of the forward.
        """
        if (
            torch.is_grad_enabled()
            or x.numel() == 0
            or autocast_dtype(x.device.type) is not None
            or not self.stands_for(layer, x.dtype, kwargs, is_prompt=x.shape[-2] > 1)
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

    def stands_for(
        self, layer: nn.Module, dtype: torch.dtype, kwargs: dict[str, Any], *, is_prompt: bool
    ) -> bool:
        """Tell whether the layer can run fused, as it is now; ``launchers`` asks too."""
        if not torch.compiler.is_compiling() and (
            self._changes is None or self._changes.found(thorough=is_prompt)
        ):
            self.read(layer)
        return not (
            self.objection is not None
            or layer.training
            or dtype != self.input_norm.weight.dtype
            or has_global_hooks()
            or (self._is_hooked and self._is_watched(kwargs))
            # a graph looks for no changes: it is traced again when these are enabled
            or not all(adapter.disable_adapters for adapter in self._disabled)
        )

    def run(
        self, run: Launchers, x: Tensor, attend: Callable[[Tensor, Tensor | None], Tensor]
    ) -> Tensor:
        """Map x [M, D] to [M, D].

        ``attend`` maps the product with q, k and v to heads [M, H D]; it is given the normed input
        [M, D] as well if the modes of the layer read that, and None if not.
        """
        dtype, normed = x.dtype, None

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

        if self.reads_hidden_states:
            norm = select("rms_norm", NORM_FWD, x.device, self.input_norm.weight)
            normed = norm(x, self.input_norm.weight, self.input_norm.eps)
        attended = attend(multiply(quantize(x, self.input_norm), self.qkv), normed)
        x = multiply(quantize(attended, self.attention_norm), self.o, residual=x)
        gate_up = multiply(quantize(x, self.mlp_norm), self.gate_up)
        return multiply(self._activate(run, gate_up), self.down, residual=x)

    def _activate(self, run: Launchers, gate_up: Tensor) -> Quantized:
        norm = self.down_norm
        return run.silu(gate_up) if norm is None else run.relu2(gate_up, norm.weight, norm.eps)

    def __getstate__(self) -> dict[str, Any]:
        # whoever reads it looks at its own layer, and chooses launchers again
        return {**self.__dict__, "_launchers": {}, "_changes": None}

    def release(self) -> None:
        """Give each linear memory of its own; this object is of no use afterwards."""
        for name in ("qkv", "o", "gate_up", "down"):
            linears = self.__dict__.get(name)  # a layer with an objection may have none
            if linears is not None:
                linears.release()

    def merge(self) -> None:
        """Merge weights anew where a linear holds something else than before."""
        for linears in (self.qkv, self.o, self.gate_up, self.down):
            linears.weight()

    @property
    def is_merged(self) -> bool:
        """Whether ``merge`` has nothing to do."""
        parts = (self.qkv, self.o, self.gate_up, self.down)
        return all(linears.is_current() for linears in parts)

    @property
    def reads_hidden_states(self) -> bool:
        """Whether a mode of the layer reads what enters it."""
        plan = getattr(self.attention, "attention_plan", None)
        return plan is not None and any(
            mode.reads_hidden_states for mode in plan.modes(self.attention.layer_idx)
        )

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


@functools.cache
def _tell_once(objection: str) -> None:
    logger.info("fused layers run module by module from now on: %s", objection)


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
