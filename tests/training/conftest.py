"""A model to train in a moment, and data that it can learn."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.models.convert import convert_checkpoint

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


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory):
    """Return a folder with a packed model of random weights and the recall model's tokenizer."""
    folder = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 1024, "max_position_embeddings": 512}
    model = bt.BitNetForCausalLM(bt.BitNetConfig(**sizes, tie_word_embeddings=True))
    ternary = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    model.config.quantization_config = {"quant_method": "bitnet", **ternary}
    model.save_pretrained(folder / "masters")
    convert_checkpoint(folder / "masters", folder / "packed", to="packed")
    AutoTokenizer.from_pretrained(bt.RECALL_MODEL).save_pretrained(folder / "packed")
    return str(folder / "packed")
