"""What Longformer has beyond a mask: windows by head, global masks, global projections."""

import pytest
import torch

from bitnet_triton.attention import AttentionContext
from bitnet_triton.attention.context import LayerInputs
from bitnet_triton.attention.modes.longformer import Longformer
from bitnet_triton.attention.tokens import Tokens

T = 12


@pytest.mark.parametrize("Hk", [1, 2, 4])
def test_each_head_has_its_window_and_dilation(Hk, heads, formula, close, visible_pairs):
    q, k, v = heads(T, Hk=Hk)
    window, dilation = (2, 5, 2, 3), (1, 2, 3, 1)
    seen = torch.stack(
        [
            visible_pairs(T, lambda i, j, w=w, d=d: (i - j) % d == 0 and i - j < w * d)
            for w, d in zip(window, dilation)
        ]
    )
    y = Longformer(window, dilation)(q, k, v, AttentionContext(0, 0.25))
    close(y, formula(q, k, v, seen[None], 0.25))


def global_pairs(visible_pairs, chosen, left=0):
    return visible_pairs(T, lambda i, j: i - j < 3 or {i, j} & chosen, left)


def test_a_mask_names_global_tokens_of_each_row(heads, formula, close, visible_pairs):
    q, k, v = heads(T)
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[0, [3, 7]], mask[1, 5] = True, True  # columns: row 1 begins with two of padding
    tokens = Tokens(leftpad=torch.tensor([0, 2]).int())
    context = AttentionContext(0, 0.25, tokens, global_tokens=mask)
    mode = Longformer(3, global_tokens=(0,), global_mask=True)
    y = mode(q, k, v, context)
    seen = [global_pairs(visible_pairs, {0, 3, 7}), global_pairs(visible_pairs, {0, 3}, left=2)]
    close(y, formula(q, k, v, torch.stack(seen)[:, None], 0.25))


def own_heads(heads, **kwargs):
    """Return the context of a layer whose projections give ``heads`` to global queries."""
    inputs = LayerInputs(torch.zeros(2, T, 1), (torch.zeros(1), torch.zeros(1)))
    return AttentionContext(0, 0.25, inputs=inputs, module=lambda *_: tuple(heads), **kwargs)


def test_global_queries_have_heads_of_their_own(heads, formula, close, visible_pairs):
    q, k, v = heads(T)
    own = heads(T)
    tokens = Tokens(leftpad=torch.tensor([0, 2]).int())
    context = own_heads(own, tokens=tokens)
    y = Longformer(3, global_tokens=(1, 6, 40), global_projections=True)(q, k, v, context)

    seen = torch.stack([global_pairs(visible_pairs, {1, 6}, left) for left in (0, 2)])
    expected = formula(q, k, v, seen[:, None], 0.25)
    dense = torch.stack([visible_pairs(T, lambda i, j: True, left) for left in (0, 2)])
    theirs = formula(*own, dense[:, None], 0.25)
    for row, left in ((0, 0), (1, 2)):
        expected[row, [left + 1, left + 6]] = theirs[row, [left + 1, left + 6]]
    close(y, expected)


def test_global_queries_by_a_mask_have_heads_of_their_own(heads, formula, close, visible_pairs):
    q, k, v = heads(T)
    own = heads(T)
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[0, [3, 7]] = True
    context = own_heads(own, global_tokens=mask)
    y = Longformer(3, global_mask=True, global_projections=True)(q, k, v, context)
    seen = torch.stack([global_pairs(visible_pairs, chosen) for chosen in ({3, 7}, set())])
    expected = formula(q, k, v, seen[:, None], 0.25)
    theirs = formula(*own, visible_pairs(T, lambda i, j: True), 0.25)
    expected[0, [3, 7]] = theirs[0, [3, 7]]
    close(y, expected)


def test_all_global_is_dense_attention_of_the_global_heads(heads, formula, close):
    q, k, v = heads(T)
    own = heads(T)
    mode = Longformer(2, global_tokens=tuple(range(T)), global_projections=True)
    y = mode(q, k, v, own_heads(own))
    close(y, formula(*own, torch.ones(T, T, dtype=torch.bool).tril(), 0.25))


def test_global_queries_without_their_heads_are_refused(heads):
    mode = Longformer(3, global_tokens=(1, 9), global_projections=True)
    with pytest.raises(ValueError, match="'global_projections': the layer has none"):
        mode(*heads(T), AttentionContext(0, 0.25))
    q, k, v = heads(4, T)
    with pytest.raises(ValueError, match="belong into the first call of a text; this one starts"):
        mode(q, k, v, AttentionContext(0, 0.25, Tokens(offset=T - 4)))
    chosen = torch.zeros(2, T, dtype=torch.bool)
    mode = Longformer(3, global_mask=True, global_projections=True)
    context = AttentionContext(0, 0.25, Tokens(offset=T - 4), global_tokens=chosen)
    assert mode(q, k, v, context).isfinite().all()
    chosen[1, T - 1] = True
    with pytest.raises(ValueError, match="belong into the first call of a text"):
        mode(q, k, v, context)


def test_gradients_reach_both_kinds_of_heads(heads):
    local = [t.requires_grad_() for t in heads(T)]
    own = [t.requires_grad_() for t in heads(T)]
    mode = Longformer(3, global_tokens=(2,), global_projections=True)
    mode(*local, own_heads(own)).square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in (*local, *own))
    assert own[0].grad[:, :2].abs().sum() == own[0].grad[:, 3:].abs().sum() == 0


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"window": (2, 3)}, {}, "'window': expected one number or 4, one a head, got 2"),
        ({"window": 2, "dilation": (1,)}, {}, "'dilation': expected one number or 4"),
        (
            {"window": 2, "global_mask": True},
            {"global_tokens": torch.ones(2, T)},
            r"expected bool \[B T\] with B=2, got torch.float32",
        ),
        (
            {"window": 2, "global_mask": True},
            {"global_tokens": torch.ones(1, T, dtype=torch.bool), "tokens": Tokens(offset=4)},
            "need a cache that keeps every key",
        ),
    ],
)
def test_what_does_not_fit_is_refused(settings, changes, message, heads):
    q, k, v = heads(T)
    with pytest.raises(ValueError, match=message):
        Longformer(**settings)(q, k, v, AttentionContext(0, 0.25, **changes))
