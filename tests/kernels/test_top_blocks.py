"""The choice of blocks: exact sets on scores that every dtype holds exactly, ties included."""

import pytest
import torch

from bitnet_triton import use_backend
from bitnet_triton.kernels import Units, pool_keys, top_blocks
from bitnet_triton.kernels.top_blocks.reference import (
    pool_keys_reference,
    top_blocks_reference,
    unit_scores,
)

TOKENS, MEANS, WINDOWS = Units(), Units("mean", 8, 8), Units("mean", 4, 8)
PAGES = Units("bounds", 4, 4)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("on_device", "forced_backend"),
]


@pytest.fixture
def on_device(request):
    """Make tensors where the test runs."""
    callspec = getattr(request.node, "callspec", None)
    with torch.device(callspec.params.get("device", "cpu") if callspec else "cpu"):
        yield


def padding():
    return torch.tensor([0, 13], dtype=torch.int32)


def integers(*shape, dtype=F32, least=-3):
    """Small integers: their sums and means are exact in every dtype here, and many are equal."""
    return torch.randint(least, 4, shape).to(dtype)


def expected_blocks(q, keys, left, *, tokens, used=None, **settings):
    """Return what the reference chooses in float64, sequence by sequence."""
    end = [tokens] * len(q) if used is None else used.tolist()
    rows = [
        top_blocks_reference(*pair, tokens=n, leftpad=first, **settings)
        for *pair, n, first in zip(q.double(), keys.double(), end, left)
    ]
    return torch.stack(rows)


# Tq, tokens, H, Hu, sets, D, units, block, selected, initial, local, dtype
GRID = [
    (100, 100, 4, 1, 4, 16, TOKENS, 8, 4, 1, 1, F32),
    (100, 100, 5, 1, 5, 24, TOKENS, 6, 5, 0, 2, BF16),
    (70, 300, 2, 1, 2, 16, TOKENS, 256, 1, 0, 1, F32),
    (3, 1000, 4, 2, 2, 16, TOKENS, 8, 5, 0, 2, F16),
    (1, 1000, 10, 2, 2, 16, MEANS, 8, 6, 1, 1, BF16),
    (33, 140, 10, 2, 2, 16, MEANS, 16, 6, 2, 1, F32),
    (33, 140, 16, 1, 1, 64, WINDOWS, 16, 3, 1, 2, F32),
    (40, 40, 2, 2, 2, 16, WINDOWS, 8, 16, 1, 1, F32),
    (33, 140, 4, 2, 2, 16, PAGES, 4, 6, 1, 1, F32),
    (1, 140, 4, 2, 4, 24, PAGES, 4, 6, 0, 1, F16),
    (1, 1, 1, 1, 1, 16, TOKENS, 4, 2, 1, 1, F32),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_blocks_of_the_best_units_are_chosen(case, device, backend):
    Tq, tokens, H, Hu, sets, D, units, block, selected, initial, local, dtype = case
    left = padding() if tokens > 13 else torch.zeros(2, dtype=torch.int32)
    q = integers(2, Tq, H, D, dtype=dtype)
    keys = integers(2, tokens + 5, Hu, D, dtype=dtype)
    if units.kind != "token":
        keys = pool_keys(keys[:, :tokens], units=units, leftpad=left)
    settings = {"block": block, "selected": selected, "initial": initial, "local": local}
    found = top_blocks(
        q, keys, units=units, sets=sets, tokens=tokens, leftpad=left, **settings
    )  # fmt: skip
    expected = expected_blocks(
        q, keys, left.tolist(), tokens=tokens, units=units, sets=sets, **settings
    )
    assert torch.equal(found, expected)


def test_scores_that_are_no_numbers_choose_nothing(device, backend):
    """And infinite ones do not stand above what is always chosen."""
    q, keys = integers(1, 40, 2, 16, least=1), integers(1, 40, 2, 16)
    keys[:, 8:12] = float("nan")
    keys[:, [16, 20, 24], :, 3] = float("inf")
    found = top_blocks(q, keys, block=4, selected=3, initial=0, local=1)
    assert (found[:, 12:] != 2).all()
    assert torch.equal(found[0, 8:12], torch.tensor([0, 1, 2]).expand(4, 2, 3).int())
    assert torch.equal(found[0, 28:, :, :2], torch.tensor([4, 5]).expand(12, 2, 2).int())
    assert torch.equal(found[0, 28:, 0, 2], torch.arange(28, 40).int() // 4)


# likewise: a row of which everything is chosen, several launches, and blocks of no power of two
LONG = [
    (300, 300, 4, 1, 4, 16, TOKENS, 2, 60, 1, 1, F32),
    (70, 300, 6, 2, 2, 24, TOKENS, 6, 50, 0, 2, BF16),
    (90, 140, 6, 1, 3, 16, MEANS, 8, 12, 1, 2, F32),
    (33, 140, 4, 2, 2, 16, WINDOWS, 16, 3, 2, 1, F32),
    (33, 140, 4, 2, 2, 16, PAGES, 4, 30, 1, 1, F32),
]


@pytest.mark.backends("triton")
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_lists_are_taken_by_numbers(case, device, backend, monkeypatch):
    from bitnet_triton.kernels.top_blocks import long_lists

    taken = []
    launch_take = long_lists.launch_take
    monkeypatch.setattr(long_lists, "_LONG", 0)
    monkeypatch.setattr(long_lists, "_MEMORY", 1)  # a tile of queries at a time
    monkeypatch.setattr(
        long_lists, "launch_take", lambda *args, **kw: taken.append(launch_take(*args, **kw))
    )
    test_the_blocks_of_the_best_units_are_chosen(case, device, backend)
    if device == "cpu":
        Tq, Hu, sets = case[0], *case[3:5]
        of_tile = -(-64 // (sets // Hu))
        assert len(taken) == -(-Tq // of_tile)


@pytest.mark.backends("triton")
def test_long_lists_of_codes_are_those_of_their_values(device, backend, monkeypatch):
    from bitnet_triton.kernels.top_blocks import long_lists

    monkeypatch.setattr(long_lists, "_LONG", 0)
    test_codes_choose_what_their_values_choose(device, backend)


@pytest.mark.parametrize("units", [MEANS, WINDOWS, PAGES], ids=str)
def test_units_are_means_and_bounds_of_their_windows(units, device, backend):
    k = torch.randn(2, 61, 3, 24).transpose(2, 3).contiguous().transpose(2, 3)
    found = pool_keys(k, units=units, leftpad=padding())
    for b, left in enumerate(padding().tolist()):
        expected = pool_keys_reference(k[b].double(), units=units, leftpad=left)
        torch.testing.assert_close(found[b].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("units", [TOKENS, WINDOWS, PAGES], ids=str)
def test_packed_sequences_are_each_sequence_alone(units, device, backend):
    lengths = [1, 37, 3, 8, 0, 50]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k = integers(99, 4, 16), integers(99, 2, 16)
    settings = {"units": units, "block": 8, "selected": 3, "sets": 2}
    pooled = units.kind != "token"
    keys = pool_keys(k, units=units, cu_seqlens=starts) if pooled else k
    found = top_blocks(q, keys, cu_seqlens=starts, **settings)
    for first, end in zip(starts.tolist(), starts[1:].tolist()):
        if first == end:
            continue
        alone = k[None, first:end]
        alone = pool_keys(alone, units=units) if pooled else alone
        assert torch.equal(found[first:end], top_blocks(q[None, first:end], alone, **settings)[0])


def test_the_end_of_a_row_is_read_from_memory(device, backend):
    used = torch.tensor([40, 61], dtype=torch.int32)
    q, keys = integers(2, 2, 4, 16), integers(2, 64, 1, 16)
    settings = {"block": 4, "selected": 4, "initial": 1, "local": 1}
    found = top_blocks(q, keys, tokens=64, leftpad=padding(), seqused=used, **settings)
    expected = expected_blocks(
        q, keys, padding().tolist(), tokens=64, used=used, units=TOKENS, sets=4, **settings
    )
    assert torch.equal(found, expected)


def test_codes_choose_what_their_values_choose(device, backend):
    """Queries whose largest entry is 127 are rounded to themselves: all products are exact."""
    q, codes = torch.randint(-127, 128, (2, 50, 4, 32)).float(), integers(2, 50, 1, 32)
    q[..., 5] = 127
    codes, scale = codes.to(torch.int8), 2.0 ** torch.randint(-2, 3, (2, 50, 1))
    settings = {"block": 4, "selected": 5, "leftpad": padding()}
    found = top_blocks(q / 4, codes, scale=scale, **settings)
    assert torch.equal(found, top_blocks(q, codes * scale[..., None], **settings))
    assert not torch.equal(found, top_blocks(q, codes.float(), **settings))


# Tq, tokens, H, Hu, sets, D, units, block, selected, initial, local, dtype, coded
FEW = [
    (1, 1300, 5, 1, 5, 64, TOKENS, 128, 4, 0, 1, BF16, False),
    (1, 1300, 5, 1, 5, 64, TOKENS, 128, 4, 0, 1, BF16, True),
    (2, 1300, 3, 1, 3, 32, TOKENS, 32, 7, 1, 2, F32, True),
    (8, 700, 1, 1, 1, 32, TOKENS, 1, 9, 0, 3, F32, False),
    (1, 5000, 4, 2, 4, 16, PAGES, 4, 20, 1, 1, BF16, False),
    (3, 1300, 4, 2, 2, 16, MEANS, 64, 3, 0, 1, F32, False),
]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_few_queries_choose_among_many_blocks(case, device, backend):
    """Steps of decoding: of several tiles of units, some at the edge, and equal scores."""
    Tq, tokens, H, Hu, sets, D, units, block, selected, initial, local, dtype, coded = case
    q, keys = integers(2, Tq, H, D, dtype=dtype), integers(2, tokens, Hu, D, dtype=dtype)
    used, scale = torch.tensor([tokens, tokens - 9], dtype=torch.int32), None
    if units.kind != "token":
        keys = pool_keys(keys, units=units, leftpad=padding())
    values = keys
    if coded:
        q[..., 3] = 127
        scale = 2.0 ** torch.randint(-1, 2, keys.shape[:3])
        keys, values = keys.to(torch.int8), keys * scale[..., None]
    settings = {"block": block, "selected": selected, "initial": initial, "local": local}
    settings |= {"units": units, "sets": sets, "tokens": tokens}
    found = top_blocks(q, keys, scale=scale, leftpad=padding(), seqused=used, **settings)
    expected = expected_blocks(q, values, padding().tolist(), used=used, **settings)
    assert torch.equal(found, expected)


def test_codes_of_a_token_each_lose_next_to_nothing():
    """Random keys in eight bits: the chosen sets overlap by more than 98 of 100 blocks."""
    q, keys = torch.randn(1, 64, 4, 128), torch.randn(1, 4096, 1, 128)
    scale = keys.abs().amax(-1) / 127
    codes = (keys / scale[..., None]).round().to(torch.int8)
    settings = {"block": 32, "selected": 16, "tokens": 4096}
    full = top_blocks(q, keys, **settings)
    low = top_blocks(q, codes, scale=scale, **settings)
    shared = (full[..., :, None] == low[..., None, :]).any(-1).float().mean()
    assert shared >= 0.98


def test_a_page_is_never_scored_below_its_keys():
    q, k = torch.randn(9, 4, 24), torch.randn(1, 64, 4, 24)
    pages = pool_keys(k, units=PAGES)[0]
    bound = unit_scores(q, pages, sets=4, bounds=True)
    best = torch.einsum("thd,uhd->thu", q, k[0]).unflatten(-1, (-1, 4)).amax(-1)
    assert (bound >= best - 1e-5).all()
    assert (bound > best + 0.1).any()


def test_keys_of_the_future_and_of_unfinished_windows_have_no_part():
    q, k = torch.randn(1, 30, 2, 16), torch.randn(1, 30, 2, 16)
    later = k.clone()
    later[:, 22:] = 100.0
    for units in (TOKENS, MEANS, PAGES):
        pooled = [k, later]
        if units.kind != "token":
            pooled = [pool_keys(t, units=units) for t in pooled]
        settings = {"units": units, "block": 8, "selected": 2, "initial": 0}
        one, two = (top_blocks(q, keys, **settings)[:, :22] for keys in pooled)
        assert torch.equal(one, two)


def test_it_is_traced_and_reads_any_strides():
    q, keys = integers(2, 20, 16, 4).transpose(2, 3), integers(2, 16, 20, 1).permute(0, 2, 3, 1)
    settings = {"block": 4, "selected": 3, "leftpad": padding()}
    expected = top_blocks(q.contiguous(), keys.contiguous(), **settings)
    assert torch.equal(top_blocks(q, keys, **settings), expected)
    traced = torch.compile(
        lambda q, k: top_blocks(q, pool_keys(k, units=MEANS), units=MEANS, block=8, selected=2),
        fullgraph=True, backend="eager",
    )  # fmt: skip
    keys = integers(2, 20, 4, 16)
    with use_backend("triton"):
        found = traced(q, keys)
    expected = top_blocks(q, pool_keys(keys, units=MEANS), units=MEANS, block=8, selected=2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block": 0}, ValueError, "`block`: expected a multiple of the units' stride 1, got 0"),
        ({"units": MEANS, "block": 12}, ValueError, "`block`: expected a multiple of the units' s"),
        ({"local": 0}, ValueError, "`initial`, `local`: expected at least 0 and 1, got 1 and 0"),
        ({"selected": 1}, ValueError, r"`selected`: expected at least initial \+ local = 2, got 1"),
        (
            {"sets": 3},
            ValueError,
            "`sets`: expected a divisor of H=4 and a multiple of Hu=1, got 3",
        ),
        ({"tokens": 9}, ValueError, "`tokens`: expected at least Tq=20, got 9"),
        ({"tokens": 99}, ValueError, "`keys`: expected at least 99 units, got 20"),
        ({"scale": torch.ones(2, 20, 1)}, TypeError, "`keys`: expected dtype int8, got float32"),
        ({"keys": torch.ones(2, 20, 1, 8)}, ValueError, r"`keys`: expected \[B U Hu D\] with"),
        ({"keys": torch.ones(2, 20, 1, 16).half()}, TypeError, "`keys`: expected dtype float32"),
        ({"leftpad": torch.zeros(2)}, TypeError, "`leftpad`: expected dtype int32, got float32"),
        ({"q": torch.ones(2, 20, 4, 16).int()}, TypeError, "`q`: expected dtype float16 or bf"),
        (
            {"cu_seqlens": torch.zeros(2).int(), "leftpad": padding()},
            ValueError,
            "`cu_seqlens`: goes without `leftpad`",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    message = message.replace("float16 or bf", "float16 or bfloat16")
    arguments = {"q": torch.ones(2, 20, 4, 16), "keys": torch.ones(2, 20, 1, 16)}
    arguments |= {"block": 4, "selected": 3} | changes
    q, keys = arguments.pop("q"), arguments.pop("keys")
    with pytest.raises(error, match=message):
        top_blocks(q, keys, **arguments)


def test_wrong_units_are_named():
    with pytest.raises(ValueError, match="`kind`: expected one of"):
        Units("sum", 2, 2)
    with pytest.raises(ValueError, match="`window`: expected a multiple of `stride`"):
        Units("mean", 4, 6)
    with pytest.raises(ValueError, match="`stride`, `window`: expected 1 of units that are tokens"):
        Units("token", 4, 4)
    with pytest.raises(ValueError, match="`units`: expected those of windows"):
        pool_keys(torch.ones(1, 8, 1, 16), units=TOKENS)
