"""A call of flash_attention: what the launchers of every backend read beside q, k and v.

torch.library takes tensors and plain numbers: ``Call.flatten`` and ``Call.build`` convert it, for
registered ops alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitnet_triton.kernels.flash_attention.description import PATTERNS
from bitnet_triton.kernels.flash_attention.mask import Mask

_NONE = -1  # stands for None in a list of integers


Flat = tuple[
    list[Tensor | None], list[int], list[int], list[int] | None, list[float]
]  # the arguments of ``Call.build``


@dataclass(frozen=True)
class Call:
    """Everything but q, k and v.

    Attributes:
        mask: which keys a query sees.
        scale: multiplies the scores.
        softcap: bounds the scores; None: does not.
        cu_seqlens_q: int32 [B + 1], where packed queries of a sequence start; None: not packed.
        cu_seqlens_k: the same for keys.
        leftpad_k: int32 [B], the first valid key, or None.
        seqused_q: int32 [B], one past the last valid query, or None.
        seqused_k: int32 [B], one past the last valid key, or None.
    """

    mask: Mask
    scale: float
    softcap: float | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None

    @property
    def decodes(self) -> bool:
        """Whether its lengths are among those that the decode kernel takes."""
        return self.cu_seqlens_q is None and self.seqused_q is None

    def is_empty(self, q: Tensor, k: Tensor) -> bool:
        """Tell whether there is no query, no key or no sequence."""
        no_sequence = self.cu_seqlens_q is not None and self.cu_seqlens_q.numel() == 1
        return q.numel() == 0 or k.numel() == 0 or no_sequence

    @property
    def tensors(self) -> list[Tensor | None]:
        """All that it holds, the mask's first."""
        tokens, start = self.mask.global_tokens, self.mask.dense_from
        return [
            tokens if isinstance(tokens, Tensor) else None,
            start if isinstance(start, Tensor) else None,
            self.cu_seqlens_q, self.cu_seqlens_k, self.leftpad_k, self.seqused_q, self.seqused_k,
        ]  # fmt: skip

    @classmethod
    def build(
        cls,
        tensors: list[Tensor | None],
        numbers: list[int],
        dilation: list[int],
        tokens: list[int] | None,
        factors: list[float],
    ) -> Call:
        """Put together what ``flatten`` took apart."""
        window, right, sinks, block, summary, start = (
            None if n == _NONE else n for n in numbers[2:]
        )
        global_tensor, dense_tensor, *lengths = tensors
        scale, softcap = factors
        mask = Mask(
            causal=bool(numbers[0]),
            window=window,
            window_right=right,
            sinks=sinks or 0,
            dilation=dilation[0] if len(dilation) == 1 else tuple(dilation),
            global_tokens=global_tensor if tokens is None else tuple(tokens),
            dense_from=start if dense_tensor is None else dense_tensor,
            pattern=None if numbers[1] == _NONE else PATTERNS[numbers[1]],
            block=block,
            summary=summary or 1,
        )
        return cls(mask, scale, softcap or None, *lengths)

    def flatten(self) -> Flat:
        """Take it apart into the arguments of ``build``."""
        mask = self.mask
        tokens, start = mask.global_tokens, mask.dense_from
        numbers = [
            int(mask.causal),
            None if mask.pattern is None else PATTERNS.index(mask.pattern),
            mask.window, mask.window_right, mask.sinks, mask.block, mask.summary,
            None if isinstance(start, Tensor) else start,
        ]  # fmt: skip
        return (
            self.tensors,
            [_NONE if n is None else n for n in numbers],
            list(mask.dilations),
            list(tokens) if isinstance(tokens, tuple) else None,
            [self.scale, self.softcap or 0.0],
        )
