"""Prompt and generated tokens in one layer: SWAA's definition (arXiv:2512.10411), and any pair."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_triton.attention import AttentionContext, AttentionPlan
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.modes.sliding import Sliding
from bitnet_triton.attention.phases import run_plan
from bitnet_triton.attention.tokens import Tokens

T = 12
SWAA = AttentionPlan((Sliding(3, sinks=1),), (Full(),))
# pairs of modes: as one mask, and as two that are run side by side
PLANS = {
    "swaa": SWAA,
    "full, then sliding": AttentionPlan((Full(),), (Sliding(3, sinks=1),)),
}


def swaa_pairs(visible_pairs, prompt_len, left=0):
    return visible_pairs(T, lambda i, j: i - j < 3 or j < 1 or i >= prompt_len - left, left)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("prompt_len", [0, 1, 5, T])
def test_generated_tokens_read_everything(
    prompt_len, as_tensor, heads, formula, close, visible_pairs
):
    q, k, v = heads(T)
    lefts = torch.tensor([0, 4]).int()
    given = torch.full((2,), prompt_len) if as_tensor else prompt_len
    y = run_plan(
        SWAA, None, q, k, v, AttentionContext(0, 0.25, Tokens(leftpad=lefts), prompt_len=given)
    )
    seen = torch.stack([swaa_pairs(visible_pairs, prompt_len, left) for left in (0, 4)])
    close(y, formula(q, k, v, seen[:, None], 0.25))


def test_each_row_has_its_prompt(heads, formula, close, visible_pairs):
    q, k, v = heads(T)
    y = run_plan(SWAA, None, q, k, v, AttentionContext(0, 0.25, prompt_len=torch.tensor([2, 9])))
    seen = torch.stack([swaa_pairs(visible_pairs, n) for n in (2, 9)])
    close(y, formula(q, k, v, seen[:, None], 0.25))


def test_without_a_length_all_tokens_are_a_prompt(heads, formula, close, visible_pairs):
    q, k, v = heads(T)
    y = run_plan(SWAA, None, q, k, v, AttentionContext(0, 0.25))
    close(y, formula(q, k, v, swaa_pairs(visible_pairs, T), 0.25))


@given(
    window=st.integers(1, T),
    sinks=st.integers(0, 4),
    prompt_len=st.integers(0, T),
    left=st.integers(0, T),
    cuts=st.sets(st.integers(1, T - 1), max_size=3),
    full_decode=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_combination_is_its_definition(window, sinks, prompt_len, left, cuts, full_decode):
    q, k, v = torch.randn(3, 2, T, 2, 8)
    sliding = Sliding(window, sinks)
    plan = AttentionPlan((sliding,), (Full() if full_decode else sliding,))
    seen = torch.zeros(2, 1, T, T, dtype=torch.bool)
    for row, start in enumerate((left, 0)):
        for i in range(T - start):
            for j in range(i + 1):
                is_near = i - j < window or j < sinks
                is_generated = full_decode and i >= prompt_len - start
                seen[row, 0, start + i, start + j] = is_near or is_generated
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    lefts = torch.tensor([left, 0]).int()
    for start, end in pairwise([0, *sorted(cuts), T]):
        tokens = Tokens(offset=start, leftpad=lefts)
        context = AttentionContext(0, 0.25, tokens, prompt_len=prompt_len)
        y = run_plan(plan, None, q[:, start:end], k[:, :end], v[:, :end], context)
        torch.testing.assert_close(y, expected[:, start:end], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("cut", [1, 4, 5, 6, 11])
def test_a_cut_anywhere_changes_nothing(name, cut, heads):
    """By phase, not by the number of queries: one token may be a prompt, and five may not."""
    q, k, v = heads(T)
    whole = run_plan(PLANS[name], None, q, k, v, AttentionContext(0, 0.25, prompt_len=5))
    parts = [
        run_plan(
            PLANS[name], None, q[:, start:end], k[:, :end], v[:, :end],
            AttentionContext(0, 0.25, Tokens(offset=offset), prompt_len=5),
        )
        for start, end, offset in ((0, cut, 0), (cut, T, cut), (T - 1, T, torch.tensor(T - 1)))
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts[:2], dim=1), whole)
    torch.testing.assert_close(parts[2], whole[:, -1:])


def test_two_modes_answer_their_own_queries(heads, formula, close, visible_pairs):
    q, k, v = heads(T)
    plan = PLANS["full, then sliding"]
    y = run_plan(plan, None, q, k, v, AttentionContext(0, 0.25, prompt_len=torch.tensor([4, 7])))
    seen = [visible_pairs(T, lambda i, j, n=n: i < n or i - j < 3 or j < 1) for n in (4, 7)]
    close(y, formula(q, k, v, torch.stack(seen)[:, None], 0.25))


def test_layers_have_their_own_modes(heads):
    plan = AttentionPlan((Full(), Sliding(2)), (Full(),))
    q, k, v = heads(T)
    for layer, mode in enumerate(plan.prefill):
        context = AttentionContext(layer, 0.25)
        assert torch.equal(run_plan(plan, None, q, k, v, context), mode(q, k, v, context))


@pytest.mark.parametrize("name", ["swaa", "full, then sliding"])
@pytest.mark.parametrize("given", [3, torch.tensor([3, 0, 9])], ids=["one", "each"])
def test_packed_sequences_have_their_prompts(given, name, heads):
    plan = {"swaa": SWAA, **PLANS}[name]
    q, k, v = heads(T)
    starts = [0, 5, T, 2 * T]
    tokens = Tokens(cu_seqlens=torch.tensor(starts).int())
    context = AttentionContext(0, 0.25, tokens, prompt_len=given)
    y = run_plan(plan, None, q, k, v, context).flatten(0, 1)
    for i, (start, end) in enumerate(pairwise(starts)):
        part = [t.flatten(0, 1)[None, start:end] for t in (q, k, v)]
        own = given if isinstance(given, int) else int(given[i])
        alone = run_plan(plan, None, *part, AttentionContext(0, 0.25, prompt_len=own))
        torch.testing.assert_close(y[None, start:end], alone)
