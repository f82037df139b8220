"""The output head of a language model: dense, or in eight bits a weight."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_triton.kernels import (
    Int8Weight,
    dense_linear,
    dense_linear_topk,
    int8_linear,
    int8_linear_topk,
    linear_cross_entropy,
)
from bitnet_triton.runtime.device import autocast_dtype

Model = TypeVar("Model", bound=nn.Module)


class OutputHead(nn.Linear):
    """``nn.Linear`` that multiplies a plain matrix, whatever the strides of its input.

    Generation asks for the logits of the last token only: ``hidden[:, -1:]``, a [B 1 K] slice with
    the strides of the whole sequence. For bfloat16 on a CPU, PyTorch multiplies such a tensor some
    fifty times slower than the same values as a matrix [B, K]. Without gradients, a few rows go
    through ``dense_linear``.

    State: ``weight`` [N, K] and ``bias`` [N], as in ``nn.Linear``.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> OutputHead:
        """Take over the parameters of ``linear``; nothing is copied."""
        with torch.device("meta"):
            head = cls(linear.in_features, linear.out_features, bias=False)
        head.weight = linear.weight
        head.bias = linear.bias
        # transformers marks what it must not fill with random numbers any more
        if getattr(linear, "_is_hf_initialized", False):
            cast("Any", head)._is_hf_initialized = True
        return head

    def forward(
        self, input: Tensor, labels: Tensor | None = None, ignore_index: int = -100
    ) -> Tensor:
        """Map [..., K] to logits [..., N]; with labels [...] to the losses [...] of these alone."""
        if labels is not None:
            return self._losses(input, labels, ignore_index)
        rows = input.reshape(-1, self.in_features)
        if self._learns(rows) or autocast_dtype(rows.device.type) is not None:
            logits = F.linear(rows, self.weight, self.bias)
        else:
            logits = dense_linear(rows, self.weight, self.bias)
        return logits.view(*input.shape[:-1], self.out_features)

    def topk(self, input: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Return the k largest logits [..., k] of input [..., K], and the tokens they are of.

        Without gradients, and without writing the other logits where the kernel can.
        """
        with torch.no_grad():
            return dense_linear_topk(input, self.weight, k, self.bias)

    def _losses(self, input: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Return float32 losses, without the logits of all tokens; there is no bias."""
        assert self.bias is None
        dtype, weight = autocast_dtype(input.device.type), self.weight
        if dtype is not None:
            input, weight = input.to(dtype), weight.to(dtype)
        return linear_cross_entropy(input, weight, labels, ignore_index=ignore_index)

    def _learns(self, rows: Tensor) -> bool:
        return torch.is_grad_enabled() and (rows.requires_grad or self.weight.requires_grad)


class _Quantized(NamedTuple):
    """The weight of a head in eight bits, and what it was made of."""

    weight: Int8Weight
    # an alias: while it lives, no other weight can lie at its address
    source: Tensor
    version: int

    @classmethod
    def make(cls, weight: Tensor) -> _Quantized:
        return cls(Int8Weight.from_dense(weight), weight.detach(), _version(weight))

    def is_of(self, weight: Tensor) -> bool:
        source = self.source
        return (
            source.data_ptr() == weight.data_ptr()
            and self.version == _version(weight)
            and source.dtype == weight.dtype
            and source.device == weight.device
        )


class Int8Head(OutputHead):
    """An output head that reads its weight in eight bits; ``quantize_head`` makes one.

    Without gradients, logits come from ``int8_linear``; with them, from the dense weight. That
    weight stays: it is what is saved and what embeddings are tied to. The int8 copy is made anew
    where the weight was moved, cast, loaded or changed.

    State: ``weight`` [N, K] and ``bias`` [N], as in ``nn.Linear``.
    """

    former_class: type[nn.Linear]
    quantized: _Quantized

    def int8_weight(self) -> Int8Weight:
        """Return the weight in eight bits, as it is now."""
        if not torch.compiler.is_compiling() and not self.quantized.is_of(self.weight):
            self.quantized = _Quantized.make(self.weight)
        return self.quantized.weight

    def forward(
        self, input: Tensor, labels: Tensor | None = None, ignore_index: int = -100
    ) -> Tensor:
        """Map [..., K] to logits [..., N]; with labels, and a gradient, to losses [...]."""
        if self._learns(input):
            return super().forward(input, labels, ignore_index)
        assert labels is None
        return int8_linear(input, self.int8_weight(), self.bias)

    def topk(self, input: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Return the k largest logits [..., k] of input [..., K], and the tokens they are of."""
        return int8_linear_topk(input, self.int8_weight(), k, self.bias)


def quantize_head(model: Model) -> Model:
    """Read the output head of a model in eight bits a weight, in place, for inference.

    A third of the bytes that a small model reads for a token are those of its output head. Its
    logits move a little: see docs/numerics.md. Parameters, ``state_dict`` and ``save_pretrained``
    stay as they are, tied embeddings stay tied; the int8 copy takes half of the memory of a 16-bit
    weight more.

    Args:
        model: of transformers, with a dense output head.

    Returns:
        The same model. ``unquantize_head`` undoes it; a second call changes nothing.

    Raises:
        TypeError: the weight is no float16, bfloat16 or float32.
        ValueError: the model has no dense output head, its weight is not loaded or not finite, or
            accelerate moves it. Nothing was changed then.
    """
    head = _head_of(model)
    if type(head) is Int8Head:
        return model
    if type(head) not in (nn.Linear, OutputHead):
        raise ValueError(
            f"`model`: expected a dense output head, got {type(head).__name__} in "
            f"{type(model).__name__}"
        )
    if hasattr(head, "_hf_hook"):
        raise ValueError("`model`: accelerate moves its output head; load it onto one device")
    if head.weight.device.type == "meta":
        raise ValueError("`model`: the weight of its output head is not loaded")
    quantized = _Quantized.make(head.weight)
    former = type(head)
    # another class, not another module: hooks, ties and references to the head stay
    cast("Any", head).__class__ = Int8Head
    head.former_class, head.quantized = former, quantized
    return model


def unquantize_head(model: Model) -> Model:
    """Give the output head that ``quantize_head`` changed its dense weight back, in place.

    Args:
        model: any model; a head that is not quantised stays as it is.

    Returns:
        The same model.
    """
    head = _head_of(model)
    if type(head) is Int8Head:
        former = head.former_class
        del head.former_class, head.quantized
        cast("Any", head).__class__ = former
    return model


def resized_head(old: nn.Linear, new: nn.Linear) -> nn.Linear:
    """Give a head that transformers made in place of ``old`` the class that ``old`` had."""
    if type(new) is not nn.Linear or not isinstance(old, OutputHead):
        return new
    head = OutputHead.from_linear(new)
    if isinstance(old, Int8Head):
        former, quantized = old.former_class, _Quantized.make(head.weight)
        cast("Any", head).__class__ = Int8Head
        made = cast("Int8Head", head)
        made.former_class, made.quantized = former, quantized
    return head


def _head_of(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _version(tensor: Tensor) -> int:
    """Return how often a tensor has been written to; those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def use_output_head(model: Any) -> None:
    """Replace the dense output head of a transformers model by ``OutputHead``, in place."""
    head = _head_of(model)
    if type(head) is nn.Linear:
        model.set_output_embeddings(OutputHead.from_linear(head))
