"""float16 that overflows is told once, and only where it does."""

from __future__ import annotations

import logging

import pytest
import torch

from bitnet_triton.models import BitNetForCausalLM
from bitnet_triton.models.overflow import _tell

pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("plan", [None, "full"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_overflow_is_told_once(checkpoint, token_ids, caplog, dtype, plan, is_fused):
    _tell.cache_clear()
    model = BitNetForCausalLM.from_pretrained(
        checkpoint(), attention=plan, fuse=is_fused, dtype=dtype
    ).eval()
    with caplog.at_level(logging.WARNING, logger="bitnet_triton"), torch.no_grad():
        assert model(token_ids(2)).logits.isfinite().all()
        assert not caplog.records
        for layer in model.model.layers:  # gates of several hundred
            layer.mlp.gate_proj.weight_scale.mul_(1000)
        logits = [model(token_ids(2), logits_to_keep=1).logits for _ in range(2)]
    is_told = [r.message for r in caplog.records if "exceed 65504" in r.message]

    assert len(is_told) == (not logits[0].isfinite().all()) == (dtype == torch.float16)
