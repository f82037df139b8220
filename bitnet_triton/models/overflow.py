"""Say once that float16 is too narrow: what it holds ends at 65504, the square of 256."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger("bitnet_triton")


def tell_overflow(outputs: Tensor, inputs: Tensor | None) -> None:
    """Warn once if outputs [B T D] for a prompt, ids or embeddings, are not finite in float16.

    What overflows inside of a model leaves NaN in every later value of its token, so one value a
    token is looked at. To look is to wait for the device: steps of one token are let pass, and
    so is training, where loss scaling expects it.
    """
    if outputs.dtype != torch.float16 or inputs is None or inputs.shape[1] < 2:
        return
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if not bool(outputs[..., 0].isfinite().all()):
        _tell()


@functools.cache
def _tell() -> None:
    logger.warning(
        "outputs in float16 are not finite: values inside of the model exceed 65504, as the square "
        "of a gate does from 256 on; load it in bfloat16 or float32 (`dtype=`)"
    )
