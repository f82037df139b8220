"""Full attention against its formula, in all the calls that transformers makes."""

import pytest
import torch

from bitnet_triton.attention import AttentionContext
from bitnet_triton.attention.modes import full
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.tokens import Tokens


@pytest.mark.parametrize("Hk", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 7])
def test_a_call_without_padding_is_causal(T, Hk, heads, formula, close):
    q, k, v = heads(T, Hk=Hk)
    y = Full()(q, k, v, AttentionContext(0, 0.3))
    close(y, formula(q, k, v, torch.ones(T, T, dtype=torch.bool).tril(), 0.3))


def test_a_step_reads_every_key(heads, formula, close):
    q, k, v = heads(1, 9)
    y = Full()(q, k, v, AttentionContext(0, 0.25, Tokens(offset=8)))
    close(y, formula(q, k, v, torch.ones(1, 9, dtype=torch.bool), 0.25))


def test_a_static_cache_counts_in_a_tensor_and_holds_more_than_there_is(heads, formula, close):
    q, k, v = heads(2, 9)
    k[:, 6:], v[:, 6:] = torch.nan, torch.nan
    y = Full()(q, k, v, AttentionContext(0, 0.25, Tokens(offset=torch.tensor(4))))
    expected = formula(q, k[:, :6], v[:, :6], torch.ones(2, 6, dtype=torch.bool).tril(4), 0.25)
    close(y, expected)


def test_padding_on_either_side_is_not_read(heads, formula, close, visible_pairs):
    q, k, v = heads(6)
    tokens = Tokens(leftpad=torch.tensor([2, 0]).int(), used_q=torch.tensor([6, 5]).int())
    y = Full()(q, k, v, AttentionContext(0, 0.25, tokens))
    seen = torch.stack([visible_pairs(6, lambda i, j: True, left) for left in (2, 0)])
    seen[1, 5] = False
    close(y, formula(q, k, v, seen[:, None], 0.25))


def test_a_matrix_is_followed(heads, formula, close):
    q, k, v = heads(5, 8)
    matrix = torch.rand(2, 1, 5, 8) < 0.5
    matrix[..., 0] = True
    y = Full()(q, k, v, AttentionContext(0, 0.25, Tokens(matrix=matrix)))
    close(y, formula(q, k, v, matrix, 0.25))


def test_dropout_drops_weights_and_still_hides_keys(heads, formula, close, visible_pairs):
    q, k, v = heads(6)
    tokens = Tokens(leftpad=torch.tensor([3, 0]).int(), window=2)
    v[:, 1:4] = 0  # rows whose result is known whatever is dropped
    context = AttentionContext(0, 0.25, tokens, dropout=0.5)
    y = Full()(q, k, v, context)
    assert torch.equal(y[0, :4], torch.zeros_like(y[0, :4]))
    without = Full()(q, k, v, AttentionContext(0, 0.25, tokens))
    assert not torch.allclose(y[1, 4:], without[1, 4:])


@pytest.mark.parametrize("added", [False, True])
def test_a_matrix_goes_with_bounded_scores(added, heads):
    q, k, v = heads(5)
    tokens = Tokens(leftpad=torch.tensor([0, 2]).int())
    expected = Full()(q, k, v, AttentionContext(0, 0.25, tokens, softcap=2.0))
    matrix = tokens.mask.visible(5, leftpad_k=tokens.leftpad)
    if added:
        matrix = torch.zeros(2, 1, 5, 5).masked_fill(~matrix, -torch.inf)
        matrix[1, :, :2] = 0  # padding: whatever it sees, nobody reads the result
    y = Full()(q, k, v, AttentionContext(0, 0.25, Tokens(matrix=matrix), softcap=2.0))
    torch.testing.assert_close(y[0], expected[0])
    torch.testing.assert_close(y[1, 2:], expected[1, 2:])


def test_the_log_says_once_that_pytorch_attends(heads, caplog):
    full._tell.cache_clear()
    q, k, v = heads(4)
    tokens = Tokens(matrix=torch.ones(1, 1, 4, 4, dtype=torch.bool))
    with caplog.at_level("INFO", logger="bitnet_triton"):
        for _ in range(2):
            Full()(q, k, v, AttentionContext(0, 0.25, tokens))
    assert caplog.text.count("runs on PyTorch's attention") == 1
