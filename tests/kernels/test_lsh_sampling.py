"""Sampling by hash tables: the law of the sample, the weights, the tables, and every backend."""

import math
from itertools import pairwise

import pytest
import torch

from bitnet_triton import use_backend
from bitnet_triton.kernels import HashTables, flash_attention, lsh_sampling_attention
from bitnet_triton.kernels.lsh_sampling import tables as tables_module
from bitnet_triton.kernels.lsh_sampling.launchers import triton_sample
from bitnet_triton.kernels.lsh_sampling.reference import (
    hash_reference,
    lsh_sampling_reference,
    probability_reference,
    weigh_reference,
)
from bitnet_triton.testing import assert_close

pytestmark = [
    pytest.mark.usefixtures("forced_backend"),
    pytest.mark.backends("triton", "reference"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHORT = torch.zeros(1, 9, 2, 8)
SHARES = ["own", "union", "proposal"]
# B, T, H, Hk, D, Dv
SHAPES = [(2, 150, 8, 2, 64, 64), (1, 97, 3, 3, 80, 48)]
# standard errors: a right test fails once in some ten million runs
SURE = 5.5


def draw(B, T, H, Hk, D, Dv=None, *, dtype=torch.float32, device="cpu"):
    """Draw inputs whose keys have a centre and whose heads agree a little."""
    Dv = Dv or D
    agreed = torch.randn(B, 1, Hk, 1, D, device=device)
    q = (torch.randn(B, 1, Hk, H // Hk, D, device=device) + agreed).flatten(2, 3)
    k = torch.randn(B, T, Hk, D, device=device) + torch.randn(B, 1, Hk, D, device=device)
    v = torch.randn(B, T, Hk, Dv, device=device)
    return tuple(t.to(dtype) for t in (q, k, v))


def grouped(q, Hk):
    return q.unflatten(2, (Hk, -1))[:, 0].transpose(1, 2)  # [B G Hk D]


def is_clear(x, planes):
    """Tell which bits rounding cannot turn."""
    sides = torch.einsum("...d,kld->...lk", x.double(), planes.double())
    return sides.abs() > 1e-5 * x.double().norm(dim=-1)[..., None, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_sides_of_planes(shape, device, backend):
    _, k, _ = draw(*shape, device=device)
    tables = HashTables.build(k[:, :1], bits=5, tables=12, seed=3)
    tables.append(k[:, 1:])
    codes = tables.tail[..., : k.shape[1] - 1].permute(0, 3, 1, 2).int()
    centred = k[:, 1:] - tables.centre[:, None]
    expected = hash_reference(centred.double(), tables.planes)
    wrong = (codes ^ expected).unsqueeze(-1) >> torch.arange(5, device=device) & 1
    assert not (wrong.bool() & is_clear(centred, tables.planes)).any()
    assert_close("norms", tables.norms[..., 1 : k.shape[1]], centred.double().norm(dim=-1).mT)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_tables_hold_each_row_in_the_bucket_of_its_code(padded, device, backend, monkeypatch):
    monkeypatch.setattr(tables_module, "SEGMENT", 64)
    _, k, _ = draw(2, 150, 2, 2, 32, device=device)
    left = torch.tensor([0, 70], dtype=torch.int32, device=device) if padded else None
    tables = HashTables.build(k, bits=4, tables=7, leftpad=left)
    assert tables.starts == [0, 64, 128, 150]
    assert tables.ids.dtype == torch.uint16
    codes = hash_reference(k - tables.centre[:, None], tables.planes)
    clear = is_clear(k - tables.centre[:, None], tables.planes).all(-1)
    for s, (start, end) in enumerate(pairwise(tables.starts)):
        ids = tables.ids[..., start:end].int()
        assert torch.equal(ids.sort(-1).values, torch.arange(end - start).expand_as(ids))
        for b in range(2):
            first = 0 if left is None else max(int(left[b]) - start, 0)
            for head in range(2):
                for table in range(7):
                    offsets = tables.offsets[s, b, head, table].tolist()
                    assert offsets[0] == 0
                    assert offsets[-1] == end - start - min(first, end - start)
                    row_ids = ids[b, head, table].tolist()
                    assert sorted(row_ids[offsets[-1] :]) == list(range(min(first, end - start)))
                    for code in range(16):
                        bucket = row_ids[offsets[code] : offsets[code + 1]]
                        assert bucket == sorted(bucket)  # in their order, on every device
                        rows = torch.tensor(bucket, dtype=torch.long) + start
                        same = codes[b, rows, head, table] == code
                        assert (same | ~clear[b, rows, head, table]).all()


@pytest.mark.parametrize("share", SHARES)
def test_backends_sample_the_same_rows(share, device):
    q, k, _ = draw(2, 150, 8, 2, 64, device=device)
    left = torch.tensor([0, 17], dtype=torch.int32, device=device)
    tables = HashTables.build(k[:, :130], bits=3, tables=24, leftpad=left, seed=1)
    tables.append(k[:, 130:])
    sampled = tables.sampled(q, share=share)
    with use_backend("reference"):
        expected = tables.sampled(q, share=share)
    assert 0.1 < expected.float().mean() < 0.9
    assert not expected[1, :, :17].any()
    # a query that lies on a plane up to rounding: one code of 24 x 8 may differ
    assert (sampled != expected).sum() <= 3
    if share == "own":
        alone = HashTables.build(k[1:, 17:130], bits=3, tables=24, seed=1)
        alone.append(k[1:, 130:])
        assert (alone.sampled(q[1:]) != sampled[1:, :, 17:]).sum() <= 3


@pytest.mark.pairwise
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_matches_reference(share, dtype, shape, padded, device, backend):
    B, T, H, Hk, *_ = shape
    q, k, v = draw(*shape, dtype=dtype, device=device)
    left = torch.tensor([23, 0][:B], dtype=torch.int32, device=device) if padded else None
    tables = HashTables.build(k[:, : T - 40], bits=3, tables=24, leftpad=left)
    tables.append(k[:, T - 40 : T - 6])
    settings = {"sinks": 3, "recent": 11, "share": share, "scale": 0.2}
    out, lse = lsh_sampling_attention(q, k, v, tables, **settings)

    sampled = torch.nn.functional.pad(tables.sampled(q, share=share), (0, 6))
    sampled = sampled.unflatten(1, (Hk, -1)).transpose(1, 2)
    rows = torch.arange(T, device=device)
    first = torch.zeros(B, 1, device=device) if left is None else left[:, None]
    exact = (rows >= first) & ((rows < first + 3) | (rows >= T - 11))

    def run(to):
        q_, k_, v_ = (t.to(to) for t in (q, k, v))
        per_head = 24 * Hk // H if share == "union" else 24
        u = weigh_reference(grouped(q_, Hk), k_, tables.centre, 3, per_head, share)
        return lsh_sampling_reference(grouped(q_, Hk), k_, v_, sampled, u, exact, 0.2)

    (exact_out, exact_lse), (eager_out, _) = run(torch.float64), run(dtype)
    assert_close("out", out, exact_out, eager=eager_out)
    assert_close("lse", lse, exact_lse)


def test_probabilities_are_those_of_the_binomial_law():
    cosine = torch.linspace(-0.99, 0.9999, 2001, dtype=torch.float64)
    for bits, L in ((10, 150), (1, 2), (8, 75)):
        x = (1 - cosine.arccos() / math.pi) ** bits
        j = torch.arange(2, L + 1, dtype=torch.float64)[:, None]
        ways = math.lgamma(L + 1) - (j + 1).lgamma() - (L + 1 - j).lgamma()
        expected = (ways + j * x.log() + (L - j) * (-x).log1p()).exp().sum(0)
        found = probability_reference(cosine, bits, L)
        assert ((found - expected).abs() <= 1e-9 * expected).all()


def test_small_probabilities_keep_their_digits(device, backend):
    """One key, ever further from the query: the weight is all that the result consists of."""
    for angle in (0.0, 0.3, 0.7, 1.1, 1.3, 1.45, 1.57):
        q = torch.tensor([1.0, 0.0], device=device).view(1, 1, 1, 2)
        k = torch.zeros(1, 400, 1, 2, device=device)
        k[..., 0], k[..., 1] = math.cos(angle), math.sin(angle)
        k[:, 200:] *= -1  # the centre is zero
        tables = HashTables.build(k, bits=6, tables=40, seed=5)
        _, lse = lsh_sampling_attention(q, k, k, tables, sinks=0, recent=0, scale=1.0)
        sampled = tables.sampled(q)[0, 0]
        u = probability_reference(torch.tensor(math.cos(angle)).double(), 6, 40)
        other = probability_reference(torch.tensor(-math.cos(angle)).double(), 6, 40)
        near, far = sampled[:200].any(), sampled[200:].any()  # equal keys have equal codes
        total = 200 * math.exp(math.cos(angle)) / u.item() if near else 0.0
        total += 200 * math.exp(-math.cos(angle)) / other.item() if far else 0.0
        if not total:
            assert lse.item() == -math.inf
        else:
            assert abs(lse.item() - math.log(total)) <= 1e-5


def test_collisions_follow_the_binomial_law(device):
    q, k, _ = draw(1, 200, 1, 1, 32, device=device)
    L = 3000
    tables = HashTables.build(k, bits=2, tables=L)
    codes_k = hash_reference(k - tables.centre[:, None], tables.planes)[0, :, 0]
    codes_q = hash_reference(q, tables.planes)[0, 0, 0]
    met = (codes_k == codes_q).sum(-1)
    cosine = torch.cosine_similarity(q[0, 0], (k - tables.centre[:, None])[0, :, 0], dim=-1)
    x = (1 - cosine.double().arccos() / math.pi) ** 2
    z = (met - L * x) / (L * x * (1 - x)).sqrt()
    assert z.abs().max() < SURE
    assert 0.4 < z.square().mean() < 2.5  # they share planes: 200 keys are not 200 draws


def estimates(share, seeds, weigh=True, exact=(0, 0)):
    """Return sums over samples, by those over all keys: of weights, and of weights times values."""
    q, k, v = draw(1, 120, 4, 2, 16)
    dense, dense_lse = flash_attention(q, k, v, return_lse=True)
    sums, vectors = [], []
    for seed in range(seeds):
        tables = HashTables.build(k, bits=4, tables=24, seed=seed)
        if weigh:
            out, lse = lsh_sampling_attention(
                q, k, v, tables, share=share, sinks=exact[0], recent=exact[1]
            )
            total = (lse - dense_lse).double().exp()
        else:
            # what a sample without weights has to say: itself, made as large as everything
            sampled = tables.sampled(q, share=share)
            scores = torch.einsum("bihd,bjhd->bhj", q, k.repeat_interleave(2, 2)) / 4
            total = (scores.double().exp() * sampled).sum(-1, keepdim=True)
            total = total * 120 / sampled.sum(-1, keepdim=True).clamp_min(1)
            total, out = total / dense_lse.double().exp(), dense
        sums.append(total.flatten())
        vectors.append((out[:, 0] * total).flatten())
    return torch.stack(sums), torch.stack(vectors), dense.flatten()


def deviation(draws, expected):
    """Return how many standard errors the mean of draws [N ...] lies from what is expected."""
    error = draws.std(0) / math.sqrt(draws.shape[0])
    return ((draws.mean(0) - expected) / error).abs()


@pytest.mark.parametrize("share", SHARES)
def test_weighted_sums_are_those_over_all_keys_in_the_mean(share):
    sums, vectors, dense = estimates(share, 250)
    assert deviation(sums, 1.0).max() < SURE
    assert deviation(vectors, dense).max() < SURE


def test_exact_rows_leave_the_sum_unbiased():
    sums, *_ = estimates("own", 120, exact=(7, 20))
    assert deviation(sums, 1.0).max() < SURE


def test_sums_without_weights_are_wrong():
    sums, *_ = estimates("own", 250, weigh=False)
    assert deviation(sums, 1.0).max() > 3 * SURE


@pytest.mark.parametrize("share", SHARES)
def test_rows_are_sampled_as_often_as_inclusion_says(share):
    q, k, _ = draw(1, 100, 4, 2, 16)
    left = torch.tensor([5], dtype=torch.int32)
    found, N = 0, 250
    for seed in range(N):
        tables = HashTables.build(k, bits=4, tables=24, seed=seed, leftpad=left)
        found = found + tables.sampled(q, share=share).double()
    u = tables.inclusion(q, share=share).double()
    assert u.shape == (1, 4, 100)
    assert (u[..., :5] == 0).all()
    assert (found[..., :5] == 0).all()
    error = (u * (1 - u) / N).sqrt() + 1 / N
    assert ((found / N - u).abs() <= SURE * error).all()
    assert u.std() > 0.05


@pytest.mark.parametrize("share", SHARES)
def test_everything_sampled_is_dense(share, device, backend):
    q, k, v = draw(1, 90, 4, 2, 32, device=device)
    tables = HashTables.build(k, bits=1, tables=120)
    out, lse = lsh_sampling_attention(q, k, v, tables, share=share)
    dense, dense_lse = flash_attention(q, k, v, return_lse=True)
    assert tables.sampled(q, share=share).all()
    # the least likely key is missed once in a million draws of 60 tables, and weighs that much less
    assert (out - dense).norm() <= 1e-4 * dense.norm()
    assert (lse - dense_lse).abs().max() <= 1e-4


def test_errors_fall_as_the_budget_grows():
    q, k, v = draw(4, 400, 4, 2, 16)
    dense, errors = flash_attention(q, k, v), []
    for count in (8, 32, 128):
        found = [
            lsh_sampling_attention(
                q, k, v, HashTables.build(k, bits=4, tables=count, seed=seed), recent=8
            )[0]
            for seed in range(12)
        ]
        errors.append((torch.stack(found) - dense).norm().item())
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


@pytest.mark.parametrize("share", SHARES)
def test_an_empty_sample_gives_zeros(share, device, backend):
    q, k, v = draw(1, 30, 4, 2, 16, device=device)
    tables = HashTables.build(k, bits=15, tables=4)
    assert not tables.sampled(q, share=share).any()
    out, lse = lsh_sampling_attention(q, k, v, tables, share=share, sinks=0, recent=0)
    assert not out.any()
    assert (lse == -math.inf).all()
    # and what is read in any case is then all there is
    out, lse = lsh_sampling_attention(q, k, v, tables, share=share, sinks=2, recent=5)
    kept = torch.cat([torch.arange(2), torch.arange(25, 30)]).to(device)
    expected, expected_lse = flash_attention(q, k[:, kept], v[:, kept], return_lse=True)
    close = {"rms": 4e-6, "worst": 1e-5}  # both have float32 errors
    assert_close("out", out, expected.double(), **close)
    assert_close("lse", lse, expected_lse.double(), **close)


def test_rows_behind_the_last_used_one_are_not_read(device, backend):
    q, k, v = draw(2, 80, 4, 2, 32, device=device)
    tables = HashTables.build(k, bits=2, tables=16)
    used = torch.tensor([60, 33], dtype=torch.int32, device=device)
    expected = lsh_sampling_attention(q, k, v, tables, recent=8, used=used)
    for b, n in enumerate(used.tolist()):
        k[b, n:], v[b, n:] = 1e4, 1e4
    out, lse = lsh_sampling_attention(q, k, v, tables, recent=8, used=used)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def codes_of(tables):
    """Return the sorted codes of all rows of a table [B Hk L T]: what buckets and tail say."""
    starts, parts = tables.starts, []
    for s, (start, end) in enumerate(pairwise(starts)):
        codes = torch.empty(*tables.ids.shape[:-1], end - start, dtype=torch.int32)
        counts = tables.offsets[s].diff(dim=-1)
        for index in torch.cartesian_prod(*map(torch.arange, tables.ids.shape[:-1])).tolist():
            at = tuple(index)
            found = torch.arange(counts.shape[-1]).repeat_interleave(counts[at].cpu())
            codes[at][tables.ids[at][start:end].long().cpu()] = found.int()
        parts.append(codes)
    return torch.cat([*parts, tables.tail[..., : tables.length - starts[-1]].int().cpu()], -1)


def test_appended_rows_are_sampled_as_if_they_had_been_built_in(device, backend, monkeypatch):
    monkeypatch.setattr(tables_module, "TAIL", 8)
    monkeypatch.setattr(tables_module, "SEGMENT", 64)
    q, k, _ = draw(1, 203, 2, 1, 16, device=device)
    together = HashTables.build(k[:, :20], bits=3, tables=5)
    together.append(k[:, 20:])
    single = HashTables.build(k[:, :20], bits=3, tables=5)
    for t in range(20, 203):
        single.append(k[:, t : t + 1])
    assert single.length == together.length == 203
    assert max(b - a for a, b in pairwise(single.starts)) <= 64
    assert len(single.starts) < 12  # few segments, however many tokens
    found, expected = codes_of(single), codes_of(together)
    centred = k - together.centre[:, None]
    clear = is_clear(centred, together.planes).all(-1).permute(0, 2, 3, 1).cpu()
    assert ((found == expected) | ~clear).all()
    assert torch.equal(single.centre, together.centre)
    assert (single.sampled(q) != together.sampled(q)).sum() <= 3


@pytest.mark.parametrize("length", [20, 33, 64, 71, 72, 90])
def test_cropped_tables_are_those_of_what_is_left(length, device, backend, monkeypatch):
    monkeypatch.setattr(tables_module, "TAIL", 8)
    monkeypatch.setattr(tables_module, "SEGMENT", 64)
    q, k, _ = draw(1, 90, 2, 1, 16, device=device)
    tables = HashTables.build(k[:, :70], bits=3, tables=5)
    whole = codes_of_all(tables, k)
    tables.append(k[:, 70:])
    tables.crop(length)
    assert tables.length == tables.keys.shape[1] == length
    assert torch.equal(codes_of(tables), whole[..., :length])
    if length < 90:  # and they go on
        tables.append(k[:, length:])
    assert torch.equal(codes_of(tables), whole)
    assert tables.sampled(q).shape[-1] == 90


def codes_of_all(tables, k):
    other = HashTables.build(k[:, :70], bits=tables.bits, tables=tables.tables)
    other.append(k[:, 70:])
    return codes_of(other)


def test_more_rows_than_16_bits_number(device, backend):
    T = 65536 + 300
    q, k, _ = draw(1, T, 1, 1, 8, device=device)
    tables = HashTables.build(k, bits=3, tables=4)
    assert tables.starts == [0, 65536, T]
    codes_k = hash_reference(k - tables.centre[:, None], tables.planes)
    codes_q = hash_reference(q, tables.planes)
    expected = (codes_k[0, :, 0] == codes_q[0, 0, 0]).sum(-1) >= 2
    found = tables.sampled(q)[0, 0]
    clear = is_clear(k - tables.centre[:, None], tables.planes).all(-1).all(-1)[0, :, 0]
    assert ((found == expected) | ~clear).float().mean() == 1.0
    assert found[65536:].any()


@pytest.mark.backends("triton")
def test_nothing_is_written_behind_a_full_list(device, backend):
    # a CPU writes every row that it meets behind those listed so far; a full list has no such place
    n = 70
    q, k, _ = draw(1, n, 4, 1, 16, device=device)
    tables = HashTables.build(k, bits=1, tables=200)
    rows, counts, _ = triton_sample(q, 1, tables.call("own"))
    assert counts.tolist() == [[[n, 0]] * 4]
    listed = rows.to(torch.int32).cpu()[0]
    assert torch.equal(listed[:, :n].sort()[0], torch.arange(n, dtype=torch.int32).expand(4, -1))
    # what nobody wrote is filled with the largest number
    assert (listed[:, n:] == 65535).all()


def test_tables_are_smaller_than_the_keys_and_values():
    k = torch.randn(1, 8192, 1, 128).bfloat16()
    tables = HashTables.build(k)
    assert (tables.bits, tables.tables) == (10, 150)
    assert tables.nbytes < 2 * k.numel() * k.element_size()


def test_equal_seeds_give_equal_results(device, backend):
    q, k, v = draw(1, 60, 2, 1, 16, device=device)
    runs = [
        lsh_sampling_attention(q, k, v, HashTables.build(k, bits=3, tables=8, seed=seed), recent=4)[
            0
        ]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_strides_do_not_matter(device, backend):
    q, k, v = draw(2, 60, 4, 2, 32, device=device)
    tables = HashTables.build(k, bits=3, tables=16)
    expected = lsh_sampling_attention(q, k, v, tables, recent=4)
    q, k, v = (torch.stack([t, t], -1)[..., 0] for t in (q, k, v))
    other = HashTables.build(k, bits=3, tables=16)
    found = lsh_sampling_attention(q, k, v, other, recent=4)
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()  # sums in another order


def test_rows_of_the_batch_change_places(device, backend):
    q, k, v = draw(3, 60, 4, 2, 32, device=device)
    left = torch.tensor([0, 9, 4], dtype=torch.int32, device=device)
    tables = HashTables.build(k[:, :50], bits=3, tables=16, leftpad=left)
    tables.append(k[:, 50:])
    expected = lsh_sampling_attention(q, k, v, tables, recent=4)
    order = torch.tensor([2, 0, 0, 1], device=device)
    tables.change_rows(lambda t: t[order])
    found = lsh_sampling_attention(q[order], k[order], v[order], tables, recent=4)
    assert torch.equal(found[0], expected[0][order])


def test_it_compiles_without_a_break():
    q, k, v = draw(1, 60, 2, 1, 16)
    tables = HashTables.build(k, bits=3, tables=8)

    def run(q, k, v):
        return lsh_sampling_attention(q, k, v, tables, recent=4)

    expected = run(q, k, v)
    with torch.no_grad():
        out, lse = torch.compile(run, fullgraph=True)(q, k, v)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"bits": 16}, ValueError, "`bits`: expected at least 1 and at most 15, got 16"),
        ({"bits": 2.0}, TypeError, "`bits`: expected an integer, got float"),
        ({"tables": 1}, ValueError, "`tables`: expected at least 2, got 1"),
        ({"keys": torch.zeros(1, 4, 2)}, ValueError, r"`keys`: expected \[B T Hk D\]"),
        ({"keys": torch.zeros(1, 0, 2, 4)}, ValueError, "each at least 1"),
        ({"keys": torch.zeros(1, 4, 2, 4).double()}, TypeError, "`keys`: expected dtype"),
        ({"leftpad": torch.zeros(2, dtype=torch.int32)}, ValueError, "`leftpad`: expected"),
        ({"leftpad": torch.zeros(1)}, TypeError, "`leftpad`: expected dtype int32"),
    ],
)
def test_wrong_tables_are_named(changes, kind, message):
    arguments = {"keys": torch.zeros(1, 4, 2, 4)} | changes
    with pytest.raises(kind, match=message):
        HashTables.build(arguments.pop("keys"), **arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"q": torch.zeros(1, 2, 4, 8)}, ValueError, r"`q`: expected \[B 1 H D\]"),
        ({"q": torch.zeros(1, 1, 3, 8)}, ValueError, "`q`: expected a multiple of Hk=2 heads"),
        ({"k": SHORT, "v": SHORT}, ValueError, "`k`: expected at least the 10 rows"),
        ({"v": torch.zeros(1, 9, 2, 8)}, ValueError, "`v`: expected"),
        ({"v": torch.zeros(1, 10, 2, 8).half()}, TypeError, "`v`: expected dtype float32"),
        ({"tables": 3}, TypeError, "`tables`: expected HashTables, got int"),
        ({"sinks": -1}, ValueError, "`sinks`: expected at least 0, got -1"),
        ({"recent": 1.5}, TypeError, "`recent`: expected an integer, got float"),
        ({"share": "all"}, ValueError, "`share`: expected one of own, union, proposal"),
        ({"share": "union"}, ValueError, "expected a multiple, at least 4, got 5"),
        ({"used": torch.zeros(1)}, TypeError, "`used`: expected dtype int32"),
        ({"q": torch.zeros(1, 1, 4, 8, requires_grad=True)}, ValueError, "without gradient"),
    ],
)
def test_wrong_arguments_are_named(changes, kind, message):
    k = torch.randn(1, 10, 2, 8)
    arguments = {
        "q": torch.zeros(1, 1, 4, 8), "k": k, "v": k, "tables": HashTables.build(k, tables=5),
    } | changes  # fmt: skip
    with pytest.raises(kind, match=message):
        lsh_sampling_attention(**arguments)


def test_other_keys_cannot_be_appended():
    tables = HashTables.build(torch.randn(1, 10, 2, 8), tables=2)
    with pytest.raises(ValueError, match="`keys`: expected"):
        tables.append(torch.randn(1, 1, 3, 8))
    with pytest.raises(TypeError, match="`keys`: expected dtype float32"):
        tables.append(torch.randn(1, 1, 2, 8).half())


def test_a_union_of_more_heads_than_a_byte_counts_is_refused():
    def attend(heads):
        torch.manual_seed(0)
        q, k = torch.randn(1, 1, heads, 16), torch.randn(1, 60, 1, 16)
        tables = HashTables.build(k, bits=1, tables=4 * heads)
        return lsh_sampling_attention(q, k, k, tables, sinks=0, recent=0, share="union")

    found = attend(127)
    with use_backend("reference"):
        expected = attend(127)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at most 127 heads a group, got 128"):
        attend(128)
