"""The linear layers of a ternary model: master weights for training, packed ones for inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitnet_triton.kernels import TernaryWeight, bit_linear, quantize_weight, ternary_linear
from bitnet_triton.kernels.flops import register_flop_formulas
from bitnet_triton.kernels.packing import CODES_PER_BYTE

_ZEROS = 0b01010101  # four zero codes


class BitLinear(nn.Linear):
    """``nn.Linear`` whose weight and input are quantised in every forward; trainable.

    State: ``weight`` [N, K] master weights and ``bias`` [N], as in ``nn.Linear``.

    Args:
        in_features: K.
        out_features: N.
        bias: add a learned bias.
        levels: "ternary" (b1.58) or "binary" (b1).
        rms_norm: applied to the input first, for models that keep a norm inside the linear.
        device: where the parameters are.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        levels: str = "ternary",
        rms_norm: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        register_flop_formulas()
        self.levels = levels
        self.rms_norm = rms_norm

    @classmethod
    def from_linear(cls, linear: nn.Linear, rms_norm: nn.Module | None = None) -> BitLinear:
        """Take over the parameters of ``linear``; nothing is copied."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=False, rms_norm=rms_norm)
        layer.weight = linear.weight
        layer.bias = linear.bias
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        return bit_linear(input, self.weight, self.bias, levels=self.levels)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"{super().extra_repr()}, levels={self.levels}"


class PackedBitLinear(nn.Linear):
    """Linear with packed ternary weights, in the layout and under the names of checkpoints.

    State: ``weight`` uint8 [N / 4, K], ``weight_scale`` [1] and ``bias`` [N], all buffers.
    transformers' two packed linears store the scale differently: ``bitlinear`` the divisor of the
    integer sum, ``autobitlinear`` its multiplier. The buffer keeps what the checkpoint holds, in
    float32 whatever the dtype of the model: it belongs to the weights, and a cast would change
    them for good. ``autobitlinear`` multiplies the bias by ``weight_scale`` too, so there the
    buffer holds the bias divided by it.

    An ``nn.Linear``, because that is what tools look for: peft puts adapters beside those and
    refuses anything else. The weight has no gradient, its input has one.

    Args:
        in_features: K.
        out_features: N, a multiple of 4.
        bias: keep a bias buffer.
        scale_divides: the integer sum is divided by ``weight_scale`` (``bitlinear``).
        rms_norm: applied to the input first.
        device: where the buffers are.
        dtype: of ``bias``.

    Raises:
        ValueError: ``out_features`` is not a multiple of 4.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None  # type: ignore[assignment]  # nn.Linear has no word for "or none"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        scale_divides: bool,
        rms_norm: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super(nn.Linear, self).__init__()  # whose own would make a float matrix [N, K]
        if out_features % CODES_PER_BYTE:
            raise ValueError(
                f"`out_features`: expected a multiple of {CODES_PER_BYTE}, got {out_features}"
            )
        register_flop_formulas()
        self.in_features = in_features
        self.out_features = out_features
        self.scale_divides = scale_divides
        self.rms_norm = rms_norm
        self._is_hf_initialized = True  # transformers draws the weights of an nn.Linear otherwise
        packed_shape = (out_features // CODES_PER_BYTE, in_features)
        self.register_buffer("weight", torch.empty(packed_shape, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(1, dtype=torch.float32, device=device))
        self.register_buffer(
            "bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all weights to zero and the scale to one: a layer without a checkpoint is valid."""
        self.weight.fill_(_ZEROS)
        self.weight_scale.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, scale_divides: bool = False, rms_norm: nn.Module | None = None
    ) -> PackedBitLinear:
        """Quantise the master weights of ``linear`` once and pack them; on "meta" only shapes."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            scale_divides=scale_divides,
            rms_norm=rms_norm,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        if linear.weight.device.type != "meta":
            weight = TernaryWeight.from_codes(*quantize_weight(linear.weight))
            layer.weight = weight.packed
            layer.weight_scale = weight.scale.reciprocal() if scale_divides else weight.scale
            if linear.bias is not None:
                bias = linear.bias.detach()
                layer.bias = bias if scale_divides else (bias / weight.scale).to(bias.dtype)
        return layer

    @property
    def ternary_weight(self) -> TernaryWeight:
        """The weight as the ops read it; shares the memory of the buffers."""
        scale = self.weight_scale.float()  # a checkpoint that is assigned brings its own dtype
        return TernaryWeight(self.weight, scale.reciprocal() if self.scale_divides else scale)

    @property
    def W_q(self) -> Tensor:
        """The packed weight, by the name that peft looks for before it calls ``dequantize``."""
        return self.weight

    def dequantize(self) -> Tensor:
        """Return the weight as float32 [N, K]; peft calls it for DoRA, which needs norms of rows.

        Raises:
            NotImplementedError: the layer scales its bias, where DoRA would take the bias as it is.
        """
        if self.bias is not None and not self.scale_divides:
            raise NotImplementedError("DoRA beside a packed `autobitlinear` with a bias")
        weight = self.ternary_weight
        return weight.codes() * weight.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedBitLinear:
        scale, had_memory = self.weight_scale, self.weight.device.type != "meta"
        super()._apply(fn, recurse)
        if not had_memory and self.weight.device.type != "meta":
            self.reset_parameters()  # to_empty(): what initialises models knows no such buffers
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        bias = self.bias
        if bias is not None and not self.scale_divides:
            bias = bias * self.weight_scale
        return ternary_linear(input, self.ternary_weight, bias)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scale_divides={self.scale_divides}"
        )


def count_packed(module: nn.Module) -> int:
    """Return how many weights and biases the packed linears of a module stand for."""
    return sum(
        layer.in_features * layer.out_features + (0 if layer.bias is None else layer.out_features)
        for layer in module.modules()
        if isinstance(layer, PackedBitLinear)
    )
