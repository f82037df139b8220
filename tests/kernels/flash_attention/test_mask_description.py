"""The description of a mask: what it shows, refuses, prints and costs."""

import json

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from bitnet_triton import triton_cpu
from bitnet_triton.kernels import Mask
from bitnet_triton.kernels.common.attention import (
    find_tile,
    head_band,
    listed_keys,
    open_rows,
    seen_keys,
)
from bitnet_triton.kernels.flash_attention import launch
from bitnet_triton.kernels.flash_attention.arguments import Call
from bitnet_triton.kernels.flash_attention.bands import CLASS, bands_of
from bitnet_triton.kernels.flash_attention.work import row_interval
from bitnet_triton.runtime import backend_objection

T = 24


def by_hand(seen):
    """Return the matrix of a rule seen(p, j), for T queries and keys."""
    return torch.tensor([[seen(p, j) for j in range(T)] for p in range(T)])


RULES = [
    (Mask(), lambda p, j: j <= p),
    (Mask(causal=False), lambda p, j: True),
    (Mask(window=1), lambda p, j: j == p),
    (Mask(window=5), lambda p, j: p - 5 < j <= p),
    (Mask(causal=False, window=3, window_right=2), lambda p, j: -3 < j - p <= 2),
    (Mask(window=3, sinks=2), lambda p, j: j <= p and (p - j < 3 or j < 2)),
    (Mask(window=3, dilation=4), lambda p, j: j in (p, p - 4, p - 8)),
    (
        Mask(causal=False, window=2, window_right=1, global_tokens=(4, 9)),
        lambda p, j: p - 2 < j <= p + 1 or p in (4, 9) or j in (4, 9),
    ),
    (Mask(window=2, global_tokens=(4,)), lambda p, j: j <= p and (p - j < 2 or p == 4 or j == 4)),
    # SWAA, arXiv:2512.10411: windows for the prompt, everything for what was generated
    (Mask(window=4, sinks=2, dense_from=16),
     lambda p, j: j <= p and (p - j < 4 or j < 2 or p >= 16)),
    (Mask(pattern="local", block=5), lambda p, j: j <= p and j // 5 == p // 5),
    (Mask(pattern="strided", block=5), lambda p, j: j <= p and (p - j < 5 or (p - j) % 5 == 0)),
    (Mask(pattern="fixed", block=5, summary=2),
     lambda p, j: j <= p and (j // 5 == p // 5 or j % 5 >= 3)),
    (Mask(pattern="fixed", block=5, window=9),
     lambda p, j: 0 <= p - j < 9 and (j // 5 == p // 5 or j % 5 == 4)),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "seen"), RULES, ids=[str(m) for m, _ in RULES])
def test_a_mask_shows_what_its_rule_says(mask, seen):
    assert torch.equal(mask.visible(T)[0, 0], by_hand(seen))


def test_queries_stand_at_the_end_of_the_keys():
    assert torch.equal(Mask(window=5).visible(3, T)[0, 0], Mask(window=5).visible(T)[0, 0, -3:])
    longer = Mask().visible(5, 2)[0, 0]
    assert torch.equal(longer.sum(1), torch.tensor([0, 0, 0, 1, 2]))


def test_positions_begin_behind_the_padding():
    left, used = (torch.tensor([n], dtype=torch.int32) for n in (3, 20))
    mask = Mask(window=2, sinks=2, global_tokens=(5,), dense_from=14)
    padded = mask.visible(20, T, leftpad_k=left, seqused_k=used)[0, 0]
    assert torch.equal(padded[3:, 3:20], mask.visible(17)[0, 0])
    assert not padded[:3].any()
    assert not padded[:, :3].any()
    assert not padded[:, 20:].any()


def test_heads_may_differ_in_dilation():
    visible = Mask(window=3, dilation=(1, 4)).visible(T)
    assert visible.shape == (1, 2, T, T)
    for head, step in enumerate((1, 4)):
        assert torch.equal(visible[:, head], Mask(window=3, dilation=step).visible(T)[:, 0])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"causal": 1}, TypeError, "`causal`: expected a bool"),
        ({"window": 0}, ValueError, "`window`: expected at least 1, got 0"),
        ({"window": 2.0}, TypeError, "`window`: expected an integer, got float"),
        ({"window_right": 3}, ValueError, "`window_right`: a causal mask"),
        ({"causal": False, "window_right": -1}, ValueError, "`window_right`: expected at least 0"),
        ({"sinks": -1}, ValueError, "`sinks`: expected at least 0"),
        ({"dilation": (1, 0)}, ValueError, "`dilation`: expected at least 1"),
        ({"global_tokens": 3}, TypeError, "`global_tokens`: expected positions or a bool tensor"),
        ({"global_tokens": (-1,)}, ValueError, "`global_tokens`: expected at least 0"),
        ({"global_tokens": torch.ones(1, 3)}, TypeError, "`global_tokens`: expected dtype bool"),
        ({"dense_from": -1}, ValueError, "`dense_from`: expected at least 0"),
        ({"dense_from": torch.ones(2)}, TypeError, "`dense_from`: expected int32"),
        ({"pattern": "dense", "block": 4}, ValueError, "`pattern`: expected one of local"),
        ({"pattern": "local"}, ValueError, "`block`: goes with a pattern"),
        ({"block": 4}, ValueError, "`block`: goes with a pattern"),
        ({"pattern": "local", "block": 4, "summary": 2}, ValueError, "`summary`: goes with"),
        ({"pattern": "fixed", "block": 4, "summary": 5}, ValueError, "`summary`: expected at most"),
    ],
)
def test_a_wrong_field_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        Mask(**settings)


def test_a_mask_is_plain_data():
    mask = Mask(window=5, dilation=(1, 2), global_tokens=(3,), sinks=2)
    assert Mask(**json.loads(json.dumps(mask.to_dict()))) == mask
    assert hash(Mask(**mask.to_dict())) == hash(mask)
    assert Mask().to_dict() == {}
    assert Mask(window=5) != Mask(window=6)
    with pytest.raises(TypeError, match="`global_tokens`: a tensor"):
        Mask(global_tokens=torch.ones(1, 3, dtype=torch.bool)).to_dict()


def test_masks_with_equal_tensors_are_equal():
    one, same, other = (torch.tensor([[True, flag]]) for flag in (True, True, False))
    assert Mask(global_tokens=one) == Mask(global_tokens=same)
    assert hash(Mask(global_tokens=one)) == hash(Mask(global_tokens=same))
    assert Mask(global_tokens=one) != Mask(global_tokens=other)


def test_a_mask_is_drawn():
    picture = Mask(window=2, sinks=1).explain(4).splitlines()
    assert picture[0] == "Mask(causal=True, window=2, sinks=1)"
    assert picture[2:] == ["█···", "██··", "███·", "█·██"]
    coarse = Mask().explain(1000, width=10).splitlines()
    assert "a character is 100 x 100" in coarse[1]
    assert coarse[2] == "▒" + 9 * "·"
    assert coarse[-1] == 9 * "█" + "▒"


def test_a_mask_is_plotted():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = Mask(window=2).plot(8)
    assert figure.axes[0].get_title() == "Mask(causal=True, window=2)"
    assert figure.axes[0].images[0].get_array().sum() == Mask(window=2).visible(8).sum()


@st.composite
def masks(draw):
    causal = draw(st.booleans())
    pattern = draw(st.sampled_from([None, "local", "strided", "fixed"]))
    block = draw(st.integers(1, 9)) if pattern else None
    return Mask(
        causal=causal,
        window=draw(st.none() | st.integers(1, 12)),
        window_right=None if causal else draw(st.none() | st.integers(0, 12)),
        sinks=draw(st.integers(0, 5)),
        dilation=draw(st.integers(1, 5)),
        pattern=pattern,
        block=block,
        summary=draw(st.integers(1, block)) if pattern == "fixed" else 1,
    )


def key_position(band, s, c, step):
    if band.kind == CLASS:
        return c + step * s
    return s // band.summary * band.block + band.block - band.summary + s % band.summary


@given(mask=masks(), Tq=st.integers(1, 40), Tk=st.integers(1, 40))
def test_the_bands_of_a_mask_show_every_visible_pair_once(mask, Tq, Tk):
    """What kernels compute, interval by interval, beside the sinks that they read from a list."""
    counts = torch.zeros(Tq, Tk, dtype=torch.int)
    for band in bands_of(mask):
        step, _, _, dilation = band.heads[0]
        for i in range(Tq):
            p = i + Tk - Tq
            R, c = divmod(p, step)
            low, high = row_interval(band, 0, R, c, Tk, mask.sinks)
            for s in range(low, high):
                j = key_position(band, s, c, step)
                if (p - j) % dilation == 0:
                    counts[i, j] += 1
    visible = mask.visible(Tq, Tk)[0, 0].int()
    assert torch.equal(counts[:, mask.sinks :], visible[:, mask.sinks :])
    assert not counts[:, : mask.sinks].any()


@pytest.mark.skipif(
    backend_objection("triton", torch.device("cpu")) is not None, reason="Triton cannot run here"
)
@triton.jit
def _count_tiles_kernel(
    counts_ptr, heads_ptr, lengths_ptr, keys_ptr, key_flags_ptr, rows_ptr, row_flags_ptr,
    B, Tq, Tk, block, summary, sinks,
    KIND: tl.constexpr, DILATED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store how many tiles of keys the forward kernel goes over, by the pieces that it is made of.

    It reads no key: every tile of ``seen_keys`` is one that the forward loads.
    """
    head = tl.program_id(1)
    step, left, right, _ = head_band(heads_ptr, head)
    b, tile, tiles = find_tile(lengths_ptr, rows_ptr, B, Tq, step, 1, BLOCK)
    if tile >= tiles:
        return
    _, p, R, is_row, first, last, c, _, n_k, _, _ = open_rows(
        lengths_ptr, rows_ptr, row_flags_ptr, b, tile, B, Tq, Tk, step, DILATED, BLOCK
    )
    _, _, _, _, edges, whole, more = seen_keys(
        R, is_row, first, last, c, step, left, right, n_k, block, summary, sinks, KIND, DILATED,
        BLOCK,
    )  # fmt: skip
    count = edges + whole + more
    if keys_ptr is not None:
        _, listed = listed_keys(keys_ptr, b, B, p, is_row, CAUSAL, 32)
        count += tl.cdiv(listed, 32)
    tl.store(counts_ptr + head * tl.num_programs(0) + tl.program_id(0), count)


def tiles_of_the_kernel(mask, Tq, Tk, heads):
    """Return what the forward kernel loads, launched as it is."""
    counted = []

    def count(kernel, grid):
        def run(q, k, v, out, lse, heads_table, lengths, keys, key_flags, rows, row_flags, *_, **o):
            counts = torch.zeros(grid[0] * grid[1], dtype=torch.int32)
            names = ("B", "Tq", "Tk", "block", "summary", "sinks", "KIND", "DILATED", "CAUSAL")
            triton_cpu.launch(_count_tiles_kernel, grid)(
                counts, heads_table, lengths, keys, key_flags, rows, row_flags,
                **{name: o[name] for name in names}, BLOCK=o["BLOCK_M"],
            )  # fmt: skip
            assert o["BLOCK_M"] == o["BLOCK_N"] == 128
            counted.append(int(counts.sum()))
            lse.zero_()

        assert kernel is launch._flash_attention_fwd_kernel
        return run

    q, k = torch.randn(1, Tq, heads, 16), torch.randn(1, Tk, 2, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch", count)
        launch.launch_forward(q, k, k, Call(mask, 0.25))
    return sum(counted)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(window=100),
        Mask(window=20, dilation=(1, 2, 3, 4), sinks=5),
        Mask(window=20, global_tokens=(3, 77, 250)),
        Mask(window=20, dense_from=450),
        Mask(pattern="strided", block=37),
        Mask(causal=False, pattern="fixed", block=12, summary=4, window=20, window_right=10),
    ],
    ids=str,
)
def test_the_kernel_loads_the_tiles_that_the_closed_form_counts(mask):
    work = mask.work(500, 700, heads=4)
    assert tiles_of_the_kernel(mask, 500, 700, heads=4) == work.tiles
    assert work.dense == mask.work(500, 700, heads=1).dense * 4


def test_the_work_of_a_window_grows_with_the_window_alone():
    long, twice = (Mask(window=1024, sinks=4).work(n).tiles for n in (2**15, 2**16))
    assert twice / long == pytest.approx(2, rel=0.02)
    assert Mask(window=1024).work(2**15).share == pytest.approx(1 / 14, rel=0.05)
    assert Mask(window=2**15).work(2**15).share == 1


def test_work_that_depends_on_tensors_is_refused():
    with pytest.raises(TypeError, match="depends on values in tensors"):
        Mask(dense_from=torch.ones(1, dtype=torch.int32)).work(64)
