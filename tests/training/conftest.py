"""A model to train in a moment, and data that it can learn."""

from __future__ import annotations

import pytest
import torch

import bitnet_triton as bt

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def masters():
    """Return a fresh model with masters, always the same."""
    torch.manual_seed(0)
    return bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES, tie_word_embeddings=True))


@pytest.fixture
def documents():
    """Return documents of counted tokens: what comes next can be learned."""
    return [
        {"input_ids": [3 + (start + i) % 60 for i in range(length)], "prompt_len": 2}
        for start, length in enumerate([12, 7, 20, 9] * 8)
    ]
