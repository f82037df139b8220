"""A prompt compressed by its last tokens: what is not compressed, and how scores are smoothed."""

import pytest
import torch

from bitnet_triton.cache import parse_memory


def test_a_prompt_within_the_window_is_not_compressed(text_of):
    text = text_of("snapkv", 8, T=60)
    text.read(16)
    assert text.memory.held == 16
    text.read(20)
    assert text.memory.held == 8


def test_neighbours_of_what_the_window_looks_at_stay(text_of):
    text = text_of("snapkv", 21, T=60, lefts=(0,))
    # longer than any key is by chance
    text.k[:, 20] *= 40 / text.k[:, 20].norm(dim=-1, keepdim=True)
    text.q[:, 44:] = text.k[:, 20:21].repeat_interleave(2, 2) / 8
    text.read(60)
    assert all(columns[:5] == [18, 19, 20, 21, 22] for columns in text.kept[0])


def test_settings_are_checked():
    with pytest.raises(ValueError, match="'kernel': expected an odd number, got 4"):
        parse_memory({"name": "snapkv", "kernel": 4})
    with pytest.raises(ValueError, match="'window': expected at least 1, got 0"):
        parse_memory({"name": "snapkv", "window": 0})
    assert torch.is_tensor(torch.ones(1))
