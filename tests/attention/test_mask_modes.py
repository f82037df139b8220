"""Every mode that is a mask: against the pairs that its definition shows, one by one."""

import pytest
import torch

from bitnet_triton.attention import AttentionContext, parse_mode
from bitnet_triton.attention.tokens import Tokens

T = 13
# mode -> which of the causal pairs it shows
MODES = [
    ({"mode": "full"}, lambda i, j: True),
    ({"mode": "sliding", "window": 1}, lambda i, j: i == j),
    ({"mode": "sliding", "window": 4, "sinks": 2}, lambda i, j: i - j < 4 or j < 2),
    ({"mode": "sliding", "window": 99}, lambda i, j: True),
    ({"mode": "local", "block": 4}, lambda i, j: i // 4 == j // 4),
    ({"mode": "strided", "block": 3}, lambda i, j: i - j < 3 or (i - j) % 3 == 0),
    (
        {"mode": "fixed", "block": 4, "summary": 2},
        lambda i, j: i // 4 == j // 4 or j % 4 >= 2,
    ),
    (
        {"mode": "longformer", "window": 3, "dilation": 2},
        lambda i, j: (i - j) % 2 == 0 and i - j < 6,
    ),
    (
        {"mode": "longformer", "window": 2, "global_tokens": [1, 6]},
        lambda i, j: i - j < 2 or {1, 6} & {i, j},
    ),
]
NAMES = [" ".join(map(str, mode.values())) for mode, _ in MODES]


@pytest.mark.parametrize(("mode", "sees"), MODES, ids=NAMES)
def test_a_mode_shows_its_pairs(mode, sees, heads, formula, close, visible_pairs):
    q, k, v = heads(T)
    tokens = Tokens(leftpad=torch.tensor([0, 5]).int())
    y = parse_mode(mode)(q, k, v, AttentionContext(0, 0.25, tokens))
    seen = torch.stack([visible_pairs(T, sees, left) for left in (0, 5)])
    close(y, formula(q, k, v, seen[:, None], 0.25))


@pytest.mark.parametrize(("mode", "sees"), MODES, ids=NAMES)
def test_a_step_is_the_last_row_of_the_whole(mode, sees, heads):
    q, k, v = heads(T)
    run, left = parse_mode(mode), torch.tensor([0, 5]).int()
    whole = run(q, k, v, AttentionContext(0, 0.25, Tokens(leftpad=left)))
    tokens = Tokens(offset=T - 1, leftpad=left)
    step = run(q[:, -1:], k, v, AttentionContext(0, 0.25, tokens))
    torch.testing.assert_close(step, whole[:, -1:])


@pytest.mark.parametrize(("mode", "sees"), MODES, ids=NAMES)
def test_what_a_mode_keeps_is_what_a_step_reads(mode, sees, heads):
    q, k, v = heads(T)
    run = parse_mode(mode)
    if run.kept is None:
        assert mode["mode"] not in ("sliding",)
        return
    whole = run(q, k, v, AttentionContext(0, 0.25))
    recent, sinks = run.kept.recent, run.kept.sinks
    index = [j for j in range(T) if j < sinks or j >= T - 1 - recent]
    step = run(q[:, -1:], k[:, index], v[:, index], AttentionContext(0, 0.25, Tokens(offset=T - 1)))
    torch.testing.assert_close(step, whole[:, -1:])


def test_top_k_keeps_the_largest_scores(heads, formula, close):
    q, k, v = heads(T, Hk=4)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    seen = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(T):
        largest = scores[:, :, i, : i + 1].topk(min(3, i + 1)).indices
        seen[:, :, i].scatter_(-1, largest, True)
    y = parse_mode({"mode": "top_k", "keys": 3})(q, k, v, AttentionContext(0, 0.25))
    close(y, formula(q, k, v, seen, 0.25))


def test_threshold_keeps_large_weights(heads, formula, close):
    q, k, v = heads(T, Hk=4)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.25).masked_fill(~causal, -torch.inf)
    weights = weights.softmax(-1)
    seen = (weights >= 0.3 * weights.amax(-1, keepdim=True)) & causal
    y = parse_mode({"mode": "threshold", "share": 0.3})(q, k, v, AttentionContext(0, 0.25))
    close(y, formula(q, k, v, seen, 0.25))


@pytest.mark.parametrize("mode", [mode for mode, _ in MODES[1:]], ids=NAMES[1:])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "`attention_dropout`: expected 0 with attention '.*', got 0.1"),
        ({"tokens": Tokens(matrix=torch.ones(2, 1, T, T))}, "`attention_mask`: attention"),
        ({"tokens": Tokens(window=3)}, "goes with causal layers"),
    ],
)
def test_what_only_full_attention_can_do_is_refused(mode, changes, message, heads):
    q, k, v = heads(T)
    with pytest.raises(ValueError, match=message):
        parse_mode(mode)(q, k, v, AttentionContext(0, 0.25, **changes))


def test_packed_sequences_do_not_see_each_other(heads):
    q, k, v = heads(T)
    run = parse_mode({"mode": "sliding", "window": 4, "sinks": 2})
    tokens = Tokens(cu_seqlens=torch.tensor([0, 5, T, 2 * T]).int())
    y = run(q, k, v, AttentionContext(0, 0.25, tokens))
    for row, part in ((0, slice(0, 5)), (0, slice(5, T)), (1, slice(0, T))):
        alone = run(*(t[row : row + 1, part] for t in (q, k, v)), AttentionContext(0, 0.25))
        torch.testing.assert_close(y[row : row + 1, part], alone)
    with pytest.raises(ValueError, match="packed sequences go without a cache"):
        run(q[:, -1:], k, v, AttentionContext(0, 0.25, tokens))
