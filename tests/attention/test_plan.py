"""AttentionPlan: plain data in, plain data out, and every refusal."""

import json

import pytest

from bitnet_triton.attention import MODES, AttentionPlan
from bitnet_triton.attention.mode import Kept
from bitnet_triton.attention.modes.fixed import Fixed
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.modes.indexed_blocks import IndexedBlocks
from bitnet_triton.attention.modes.linear import Linear
from bitnet_triton.attention.modes.local import Local
from bitnet_triton.attention.modes.longformer import Longformer
from bitnet_triton.attention.modes.lsh_sampling import LshSampling
from bitnet_triton.attention.modes.native_sparse import NativeSparse
from bitnet_triton.attention.modes.pooled_blocks import PooledBlocks
from bitnet_triton.attention.modes.quest import Quest
from bitnet_triton.attention.modes.reformer import Reformer
from bitnet_triton.attention.modes.routing import Routing
from bitnet_triton.attention.modes.sliding import Sliding
from bitnet_triton.attention.modes.streaming import Streaming
from bitnet_triton.attention.modes.strided import Strided
from bitnet_triton.attention.modes.threshold import Threshold
from bitnet_triton.attention.modes.top_k import TopK
from bitnet_triton.attention.modes.verified_sampling import VerifiedSampling
from bitnet_triton.cache import GrowingLayer, StreamingLayer

WINDOW_4 = {"mode": "sliding", "window": 4, "sinks": 1}


@pytest.mark.parametrize(
    ("value", "prefill", "decode"),
    [
        ("full", [Full()], [Full()]),
        ({"mode": "full"}, [Full()], [Full()]),
        (WINDOW_4, [Sliding(4, 1)], [Sliding(4, 1)]),
        ({"mode": "streaming", "window": 4}, [Streaming(4)], [Streaming(4)]),
        ({"mode": "local", "block": 4}, [Local(4)], [Local(4)]),
        ({"mode": "strided", "block": 4}, [Strided(4)], [Strided(4)]),
        ({"mode": "fixed", "block": 4, "summary": 2}, [Fixed(4, 2)], [Fixed(4, 2)]),
        ({"mode": "top_k", "keys": 4}, [TopK(4)], [TopK(4)]),
        ({"mode": "threshold", "share": 0.5}, [Threshold(0.5)], [Threshold(0.5)]),
        ({"mode": "pooled_blocks", "block": 8}, [PooledBlocks(8)], [PooledBlocks(8)]),
        ({"mode": "indexed_blocks", "block": 8}, [IndexedBlocks(8)], [IndexedBlocks(8)]),
        ({"mode": "quest", "page": 8, "budget": 64}, [Quest(8, 64)], [Quest(8, 64)]),
        ({"mode": "reformer", "rounds": 2}, [Reformer(2)], [Reformer(2)]),
        ({"mode": "routing", "clusters": 8}, [Routing(8)], [Routing(8)]),
        ({"mode": "linear", "form": "kda"}, [Linear("kda")], [Linear("kda")]),
        ({"mode": "lsh_sampling", "tables": 9}, [LshSampling(10, 9)], [LshSampling(10, 9)]),
        (
            {"mode": "verified_sampling", "delta": 0.1},
            [VerifiedSampling(0.05, 0.1)],
            [VerifiedSampling(0.05, 0.1)],
        ),
        (
            {"mode": "native_sparse", "window": 64, "shared_kv": False},
            [NativeSparse(window=64, shared_kv=False)],
            [NativeSparse(window=64, shared_kv=False)],
        ),
        (
            {"mode": "longformer", "window": [2, 3], "global_tokens": [0], "global_mask": True},
            [Longformer((2, 3), global_tokens=(0,), global_mask=True)],
            [Longformer((2, 3), global_tokens=(0,), global_mask=True)],
        ),
        ({"prefill": "full", "decode": WINDOW_4}, [Full()], [Sliding(4, 1)]),
        (
            {"prefill": ["full", WINDOW_4], "decode": "full"},
            [Full(), Sliding(4, 1)],
            [Full()],
        ),
    ],
)
def test_plain_data_becomes_a_plan_and_comes_back(value, prefill, decode):
    plan = AttentionPlan.from_config(value)
    assert (list(plan.prefill), list(plan.decode)) == (prefill, decode)
    data = json.loads(json.dumps(plan.to_config()))
    assert AttentionPlan.from_config(data) == plan
    assert AttentionPlan.from_config(data).to_config() == data


def test_the_round_trip_above_has_every_mode():
    cases = test_plain_data_becomes_a_plan_and_comes_back.pytestmark[0].args[1]
    assert {type(mode) for _, *plans in cases for plan in plans for mode in plan} == set(
        MODES.values()
    )


def test_each_layer_and_phase_has_its_mode():
    plan = AttentionPlan.from_config({"prefill": ["full", WINDOW_4], "decode": "full"})
    modes = {(i, p): plan.mode(i, p) for i in range(2) for p in ("prefill", "decode")}
    assert modes == {
        (0, "prefill"): Full(),
        (1, "prefill"): Sliding(4, 1),
        (0, "decode"): Full(),
        (1, "decode"): Full(),
    }
    assert plan.has_phases
    assert not AttentionPlan.from_config("full").has_phases


@pytest.mark.parametrize(
    ("prefill", "decode", "kept"),
    [
        (Full(), Full(), None),
        (Sliding(4, 1), Full(), None),
        (Sliding(4, 1), Sliding(4, 1), Kept(3, 1)),
        (Sliding(4, 1), Sliding(9), Kept(8, 1)),
        (Streaming(4, 2), Streaming(4, 2), Kept(3, 2)),
        (Longformer((4, 2), dilation=(1, 5)), Longformer(2), Kept(5, 0)),
        (Longformer(4, global_tokens=(0,)), Longformer(4), None),
        (Longformer(4, global_mask=True), Longformer(4), None),
        (Local(4), Local(4), None),
        (TopK(4), TopK(4), None),
    ],
)
def test_a_layer_keeps_what_either_phase_may_see(prefill, decode, kept):
    memory = AttentionPlan((prefill,), (decode,)).memory(0)
    if kept is None:
        assert isinstance(memory, GrowingLayer)
    else:
        assert (memory.recent, memory.sinks) == (kept.recent, kept.sinks)
    streams = prefill.counts_positions and decode.counts_positions
    assert isinstance(memory, StreamingLayer) == streams


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            "ful",
            ValueError,
            r"expected a mode or a preset out of: full, .*; got 'ful'; did you mean 'full'\?",
        ),
        ("slding", ValueError, r"got 'slding'; did you mean 'sliding'\?"),
        ({"mode": 3}, ValueError, "expected a mode out of: full, .*; got 3"),
        ({}, ValueError, "got None"),
        (
            {"mode": "sliding", "window": 3, "sink": 2},
            ValueError,
            r"expected a setting of mode 'sliding' out of: window, sinks; got 'sink'; did you mean",
        ),
        ({"mode": "full", "window": 3}, ValueError, r"mode 'full' out of: none; got 'window'"),
        ({"mode": "sliding"}, TypeError, "mode 'sliding': the setting 'window' is missing"),
        ({"mode": "sliding", "window": 0}, ValueError, "'window': expected at least 1, got 0"),
        ({"mode": "sliding", "window": "4"}, TypeError, "'window': expected an integer, got str"),
        ({"mode": "sliding", "window": True}, TypeError, "'window': expected an integer, got bool"),
        ({"mode": "sliding", "window": 4, "sinks": -1}, ValueError, "'sinks': expected at least 0"),
        (
            {"mode": "streaming", "window": 4, "sinks": 0},
            ValueError,
            "'sinks': expected at least 1",
        ),
        ({"mode": "fixed", "block": 2, "summary": 3}, ValueError, "at most the block of 2, got 3"),
        ({"mode": "threshold", "share": 0}, ValueError, "'share': expected more than 0, up to 1"),
        ({"mode": "threshold", "share": "0.5"}, TypeError, "'share': expected a number, got str"),
        ({"mode": "top_k", "keys": 0}, ValueError, "'keys': expected at least 1"),
        ({"mode": "local", "block": 0}, ValueError, "'block': expected at least 1"),
        ({"mode": "lsh_sampling", "bits": 16}, ValueError, "'bits': expected at most 15, got 16"),
        ({"mode": "lsh_sampling", "recent": 0}, ValueError, "'recent': expected at least 1, got 0"),
        ({"mode": "lsh_sampling", "share": "all"}, ValueError, "'share' out of: own, union"),
        ({"mode": "verified_sampling", "epsilon": 1}, ValueError, "'epsilon': expected more than"),
        ({"mode": "verified_sampling", "delta": "x"}, TypeError, "'delta': expected a number"),
        ({"mode": "verified_sampling", "selected": 3}, ValueError, "'selected': expected at least"),
        ({"mode": "verified_sampling", "seed": 2**20}, ValueError, "'seed': expected less than"),
        (
            {"mode": "longformer", "window": [4, 0]},
            ValueError,
            "'window': expected at least 1, got 0",
        ),
        (
            {"mode": "longformer", "window": 4, "global_tokens": 0},
            TypeError,
            "'global_tokens': expected a list, got int",
        ),
        (
            {"mode": "longformer", "window": 4, "global_mask": 1},
            TypeError,
            "'global_mask': expected true or false, got int",
        ),
        (
            {"mode": "longformer", "window": 4, "global_projections": True},
            ValueError,
            "expected 'global_tokens' or 'global_mask'",
        ),
        ({"prefill": "full"}, ValueError, "expected the phases 'prefill' and 'decode', got"),
        ({"prefill": "full", "decode": "full", "x": 1}, ValueError, "got 'prefill', 'decode', 'x'"),
        ({"prefill": 1, "decode": "full"}, TypeError, "expected a name or a dict, got int"),
        (["full"], TypeError, "expected a name or a dict, got list"),
    ],
)
def test_what_is_no_plan_is_refused_by_name(value, error, message):
    with pytest.raises(error, match=message):
        AttentionPlan.from_config(value)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_plan_has_one_mode_or_one_a_layer(count):
    plan = AttentionPlan((Full(),), (Full(),) * count)
    if count == 1:
        plan.check_layers(2)
        return
    with pytest.raises(ValueError, match=f"one mode or 2, one a layer, got {count} for 'decode'"):
        plan.check_layers(2)


def test_tables_of_one_kind_serve_no_others():
    with pytest.raises(ValueError, match="no memory serves 'lsh_sampling' and 'lsh_sampling'"):
        LshSampling(bits=9).memory(LshSampling(bits=10))
    with pytest.raises(ValueError, match="no memory serves 'verified_sampling' and 'lsh_sampling'"):
        AttentionPlan((LshSampling(),), (VerifiedSampling(),)).check_layers(2)
