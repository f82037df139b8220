"""Modes that a mask describes, and the attention that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from bitnet_triton.attention.context import AttentionContext
from bitnet_triton.attention.mode import Mode, Step, StepLayer, StepTensors
from bitnet_triton.cache import Attended, Memory
from bitnet_triton.kernels import Mask, flash_attention


class MaskMode(Mode):
    """A mode that is a mask and nothing else.

    Subclasses are frozen dataclasses of their settings. The masks that transformers makes of
    padding are followed; a mask that a user passes as a matrix is refused.
    """

    @property
    def mask(self) -> Mask:
        """Which keys a query sees."""
        raise NotImplementedError

    @property
    def takes_dense_rows(self) -> bool:
        """A mask has dense rows."""
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Map q [B Tq H D] and k, v [B Tk Hk D] to [B Tq H D]."""
        check_served(self, context)
        return attend_and_tell(q, k, v, self.mask, context)

    def step(self, memory: Memory, layer: StepLayer) -> Step | str:
        """Write the new token into the memory, and read what the mask shows of it."""
        mask = self.mask
        objection = memory.decode_objection(mask)
        if objection is not None:
            return objection

        def run(step: StepTensors) -> Tensor:
            q = memory.write(step.heads, step.cos, step.sin, step.places)
            return memory.decode(q, step.places, mask=mask, scale=layer.scale)[0]

        return run


def attend_and_tell(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, context: AttentionContext
) -> Tensor:
    """Attend by ``mask``, and tell the memory of the layer that attention has run."""
    attend = flash_attention if context.memory is None else context.memory.attend
    out, lse = masked_attention(q, k, v, mask, context, attend)
    if context.memory is not None:
        assert context.inputs is not None
        context.memory.after(
            Attended(
                q, k, lse, context.scale, context.softcap, context.inputs.rotary,
                is_whole=context.tokens.used_q is None,
            )
        )  # fmt: skip
    return out


def check_served(mode: Mode, context: AttentionContext) -> None:
    """Raise ValueError where a call asks for what no mode but full attention has."""
    name = mode.name
    if context.dropout:
        raise ValueError(
            f"`attention_dropout`: expected 0 with attention {name!r}, got {context.dropout}"
        )
    if context.tokens.matrix is not None:
        raise ValueError(
            f"`attention_mask`: attention {name!r} takes padding on one side of a row, [B T]; "
            f"got {list(context.tokens.matrix.shape)}, or tokens on both sides of padding"
        )
    if not context.tokens.causal or context.tokens.window is not None:
        raise ValueError(
            f"`attention`: {name!r} goes with causal layers that have no window of their own"
        )


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, context: AttentionContext,
    attend: Callable[..., Any] = flash_attention,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to what ``mask`` shows of the keys that a layer holds.

    Args:
        q: [B Tq H D].
        k: [B Tk Hk D]; the latest keys, or the first and the latest ones.
        v: [B Tk Hk Dv].
        mask: in positions, which padding does not count.
        context: padding and the rest.
        attend: takes what ``flash_attention`` does.

    Returns:
        out [B Tq H Dv] and the logarithm of the sum of exponentials [B H Tq]; with packed sequences
        the latter is [H, B Tq].
    """
    if context.dense_from is not None:
        mask = replace(mask, dense_from=context.dense_from)
    settings: Any = {
        "scale": context.scale, "softcap": context.softcap, "return_lse": True,
    }  # fmt: skip
    if context.s_aux is not None:
        settings["s_aux"] = context.s_aux
    starts = context.tokens.cu_seqlens
    if starts is None:
        settings |= context.tokens.lengths(q, k)
        padding = None if context.memory is None else context.memory.held_padding()
        if padding is not None:
            settings["leftpad_k"] = padding
        return attend(q, k, v, mask=mask, **settings)
    if k.shape[1] != q.shape[1]:
        raise ValueError("`position_ids`: packed sequences go without a cache")
    out, lse = attend(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
        mask=mask, cu_seqlens_q=starts, cu_seqlens_k=starts, **settings,
    )  # fmt: skip
    return out.unflatten(0, q.shape[:2]), lse
