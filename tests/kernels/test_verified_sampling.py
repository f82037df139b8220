"""Verified sampling: the draw, its budget, the bound on the error, and every backend."""

import math

import pytest
import torch

from bitnet_triton.kernels import SignCodes, flash_attention, verified_sampling_attention
from bitnet_triton.kernels.lsh_sampling.signs import sign_pages, sign_scores
from bitnet_triton.kernels.lsh_sampling.verified import units_of
from bitnet_triton.kernels.lsh_sampling.verified_reference import (
    budget_reference,
    normal_spread_reference,
    permutation_reference,
    verified_reference,
    verified_rows_reference,
)
from bitnet_triton.kernels.top_blocks import pool_keys
from bitnet_triton.kernels.top_blocks.op import top_blocks
from bitnet_triton.testing import assert_close

pytestmark = [
    pytest.mark.usefixtures("forced_backend"),
    pytest.mark.backends("triton", "reference"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, T, H, Hk, D, Dv
SHAPES = [(2, 150, 8, 2, 64, 64), (1, 97, 3, 3, 80, 48)]
SURE = 5.5
Z_20 = 1.2815515655446004  # beyond it lie a fifth of all draws, on both sides
SMALL = {"page": 8, "selected": 5, "base": 20, "epsilon": 0.2, "delta": 0.2}


def draw(B, T, H, Hk, D, Dv=None, *, dtype=torch.float32, device="cpu"):
    q = torch.randn(B, 1, H, D, device=device) + torch.randn(B, 1, 1, D, device=device)
    k = torch.randn(B, T, Hk, D, device=device)
    v = torch.randn(B, T, Hk, Dv or D, device=device)
    return tuple(t.to(dtype) for t in (q, k, v))


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("tails", ["normal", "sampled"])
def test_matches_reference(dtype, shape, padded, seed, tails, device, backend):
    B, T, H, Hk, *_ = shape
    q, k, v = draw(*shape, dtype=dtype, device=device)
    left = torch.tensor([23, 0][:B], dtype=torch.int32, device=device) if padded else None
    out, lse, counts = verified_sampling_attention(
        q, k, v, **SMALL, seed=seed, scale=0.1, leftpad=left, tails=tails
    )
    pages = top_blocks(
        q, pool_keys(k, units=units_of(8), leftpad=left), block=8, selected=5, units=units_of(8),
        initial=1, local=3, sets=Hk, tokens=T, leftpad=left,
    )  # fmt: skip

    def run(to):
        outs, lses = torch.empty(out.shape, dtype=to), torch.empty(lse.shape, dtype=to)
        for b in range(B):
            first = 0 if left is None else int(left[b])
            for head in range(Hk):
                group = slice(head * H // Hk, (head + 1) * H // Hk)
                rows = (q[b, 0, group], k[b, first:, head], v[b, first:, head])
                rows = [t.to(to) for t in rows]
                settings = {
                    "page": 8, "base": 20, "deviations": Z_20, "epsilon": 0.2, "seed": seed,
                    "head": head, "scale": 0.1, "tails": tails,
                }  # fmt: skip
                chosen, drawn, told = verified_rows_reference(
                    rows[0].double(), rows[1].double(), pages[b, 0, head], **settings
                )
                assert told == 20
                # a budget beside a whole number may be rounded up or not
                assert abs(len(drawn) - int(counts[b, head])) <= 1
                if len(drawn) != int(counts[b, head]):
                    settings["epsilon"] *= 1 - (int(counts[b, head]) - len(drawn)) * 1e-4
                    chosen, drawn, _ = verified_rows_reference(
                        rows[0].double(), rows[1].double(), pages[b, 0, head], **settings
                    )
                outs[b, 0, group], lses[b, group, 0] = verified_reference(*rows, chosen, drawn, 0.1)
        return outs, lses

    (exact_out, exact_lse), (eager_out, _) = run(torch.float64), run(dtype)
    assert_close("out", out, exact_out, eager=eager_out)
    assert_close("lse", lse, exact_lse)


def test_an_order_is_a_permutation_and_each_row_comes_first_equally_often():
    for n in (1, 2, 3, 17, 64, 1000):
        assert torch.equal(permutation_reference(n, 12345).sort().values, torch.arange(n))
    n, N = 24, 6000
    first = torch.stack([permutation_reference(n, 7919 * key + 3)[:2] for key in range(N)])
    counts = torch.bincount(first[:, 0], minlength=n)
    z = (counts - N / n) / math.sqrt(N / n * (1 - 1 / n))
    assert z.abs().max() < SURE
    pairs = torch.bincount(first[:, 0] * n + first[:, 1], minlength=n * n).view(n, n)
    share = 1 / (n * (n - 1))
    z = (pairs - N * share) / math.sqrt(N * share)
    assert z[~torch.eye(n, dtype=torch.bool)].square().mean() < 1.4
    assert not pairs.diagonal().any()


def test_every_row_drawn_is_dense(device, backend):
    q, k, v = draw(2, 150, 4, 2, 32, device=device)
    dense, dense_lse = flash_attention(q, k, v, return_lse=True)
    out, lse, counts = verified_sampling_attention(q, k, v, **SMALL | {"epsilon": 1e-6})
    assert (counts == 150 - 5 * 8 + 2).all()  # the last page has 6 rows
    close = {"rms": 4e-6, "worst": 1e-5}  # both have float32 errors
    assert_close("out", out, dense.double(), **close)
    assert_close("lse", lse, dense_lse.double(), **close)
    # and so is a text that its pages cover
    out, lse, counts = verified_sampling_attention(q, k[:, :37], v[:, :37], **SMALL)
    dense, dense_lse = flash_attention(q, k[:, :37], v[:, :37], return_lse=True)
    assert not counts.any()
    assert_close("out", out, dense.double(), **close)
    assert_close("lse", lse, dense_lse.double(), **close)


def attention(kind, T=4000, D=32):
    """Draw a query of each kind of attention: what the largest weights have, and where."""
    q, k, v = draw(1, T, 2, 1, D)
    k *= 1.6 if kind == "heavy tails" else 0.5
    if kind == "peaked":  # neighbours are alike: pages tell
        k += 1.6 * torch.randn(1, T // 32, 1, D).repeat_interleave(32, 1)
    if kind == "planted":
        for t in (700, 1900, 3333):
            k[0, t, 0] = 3 * q[0, 0, 0] / q[0, 0, 0].norm() * math.sqrt(D) / 2
    return q, k, v


@pytest.mark.parametrize("kind", ["spread", "peaked", "planted", "heavy tails"])
def test_errors_beyond_epsilon_are_no_more_than_delta(kind):
    epsilon, delta, steps = 0.1, 0.1, 400
    q, k, v = attention(kind)
    bounds = pool_keys(k, units=units_of(32))
    _, dense = flash_attention(q, k, v, return_lse=True)
    errors, rows = [], []
    for seed in range(steps):
        _, lse, counts = verified_sampling_attention(
            q, k, v, epsilon=epsilon, delta=delta, selected=16, base=256, seed=seed, bounds=bounds
        )
        errors.append(((lse - dense).exp() - 1).abs().flatten())
        rows.append(counts.sum())
    beyond = (torch.stack(errors) > epsilon).float().mean(0)  # of each head
    assert (beyond <= delta + 3.5 * math.sqrt(delta * (1 - delta) / steps)).all()
    # some keys with heavy tails ask for nearly all rows
    most = 1.0 if kind == "heavy tails" else 0.98
    assert torch.stack(rows).float().mean() < most * (4000 - 16 * 32)


def test_exponents_that_are_normal_have_the_spread_of_the_law():
    deviation, count, N = 1.5, 3000, 400
    x = torch.randn(N, count, dtype=torch.float64) * deviation - 2
    terms = x.exp()
    found = normal_spread_reference(x, count, 0.0)
    # the law leaves out what lies beyond the largest of so many: a little less than all of it
    assert 0.5 < found.mean() / terms.var(-1).mean() < 1.1
    # sixty of them tell it about as well as all, which they do not tell of themselves
    few = normal_spread_reference(x[:, :60], count, 0.0)
    assert (few / found).log().abs().median() < 0.8
    assert few.std() < terms[:, :60].var(-1).std()
    assert (normal_spread_reference(x[:, :60], count, 2.0) > few).all()


def test_sums_are_unbiased():
    q, k, v = draw(1, 400, 4, 2, 16)
    dense, dense_lse = flash_attention(q, k, v, return_lse=True)
    sums, vectors, N = [], [], 300
    for seed in range(N):
        out, lse, _ = verified_sampling_attention(
            q, k, v, **SMALL | {"epsilon": 0.3, "base": 40}, seed=seed
        )
        total = (lse - dense_lse).double().exp()
        sums.append(total.flatten())
        vectors.append((out[:, 0] * total).flatten())
    for draws, expected in ((torch.stack(sums), 1.0), (torch.stack(vectors), dense.flatten())):
        error = draws.std(0) / math.sqrt(N)
        assert ((draws.mean(0) - expected) / error).abs().max() < SURE


def test_the_budget_follows_from_the_spread():
    scores = torch.randn(2, 5000, dtype=torch.float64) * torch.tensor([[0.3], [0.6]])
    rest = torch.arange(5000) >= 100
    told = torch.arange(100, 600)
    budget = budget_reference(scores, rest, told, 1.6, 0.05, 50, "sampled")
    terms = scores[1].exp()
    variance, off = terms[told].var(), terms[told] - terms[told].mean()
    variance = variance + 1.6 * ((off.pow(4).mean() - variance**2) / 500).sqrt()
    estimate = terms[~rest].sum() + 4900 * terms[told].mean()
    expected = (1.6 / 0.05 * 4900 / estimate) ** 2 * variance
    assert budget == math.ceil(expected / (1 + expected / 4900))
    assert budget_reference(scores, rest, told, 1.6, 0.025, 50, "sampled") > 2 * budget
    normal = normal_spread_reference(scores[:, told] - scores[:, told].amax(-1, True), 4900, 1.6)
    assert (normal > 0).all()
    # of few terms on a steep slope the sampled variance is most often far too small
    few = told[:480].view(-1, 60)
    steep = [(3 * scores, rest, part, 1.6, 0.5, 50) for part in few]
    normal, sampled = (
        sum(budget_reference(*arguments, kind) for arguments in steep)
        for kind in ("normal", "sampled")
    )
    assert normal > sampled
    assert budget_reference(scores * 0, rest, told, 1.6, 0.05, 50, "sampled") == 50
    assert budget_reference(scores, rest & False, told[:0], 1.6, 0.05, 50, "sampled") == 0


def test_a_heavy_row_that_no_page_has_shows_as_a_larger_budget(device, backend):
    q, k, v = attention("spread")
    q = q[:, :, :1]
    settings = {"selected": 4, "base": 2000, "epsilon": 0.1, "delta": 0.1}
    *_, before = verified_sampling_attention(q, k, v, **settings)
    blind = torch.zeros_like(pool_keys(k, units=units_of(32)))  # chooses the first pages
    for t in range(200, 3900, 400):
        k[0, t, 0] = q[0, 0, 0] * 2.5 / q.norm() * math.sqrt(32)
    *_, after = verified_sampling_attention(q, k, v, bounds=blind, **settings)
    assert after.item() > before.item()


@pytest.mark.parametrize("D", [64, 40])
def test_signs_score_by_the_bits_that_codes_share(D, device, backend):
    q, k, _ = draw(2, 90, 4, 2, D, device=device)
    signs = SignCodes.build(k, seed=3)
    planes = signs.planes.transpose(0, 1).flatten(0, 1).double()  # [16 W, D]
    assert signs.codes.shape == (2, 2, -(-D // 16), 90)
    torch.testing.assert_close(planes[:D] @ planes[:D].T, torch.eye(D).double(), atol=1e-6, rtol=0)
    keys = (k - k.mean(1, keepdim=True)).double() @ planes.T > 0  # [B T Hk 16 W]
    asked = (q.double() @ planes.T > 0)[:, 0].unflatten(1, (2, 2))  # [B Hk G 16 W]
    same = (keys[:, :, :, None] == asked[:, None]).sum((-2, -1)).transpose(1, 2)
    scores = sign_scores(q, signs.codes, signs.planes)
    # a product that lies on a plane up to rounding may turn
    assert ((scores - same).abs() <= 1).all()
    assert (scores == same).float().mean() > 0.99


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_pages_by_signs_are_those_with_the_row_most_alike(padded, device, backend):
    q, k, v = draw(2, 90, 4, 2, 64, device=device)
    left = torch.tensor([0, 21], dtype=torch.int32, device=device) if padded else None
    used = torch.tensor([90, 77], dtype=torch.int32, device=device)
    signs = SignCodes.build(k, leftpad=left)
    settings = {"page": 8, "selected": 6, "initial": 1, "local": 2, "leftpad": left, "used": used}
    found = sign_pages(q, signs, **settings)
    scores = sign_scores(q, signs.codes, signs.planes)
    for b in range(2):
        first = 0 if left is None else int(left[b])
        for head in range(2):
            rows = scores[b, head, first : int(used[b])]
            best = torch.stack([page.max() for page in rows.split(8)])
            forced = [0, len(best) - 2, len(best) - 1]
            chosen = found[b, 0, head].tolist()
            assert chosen == sorted(set(chosen))
            assert set(forced) <= set(chosen)
            others = [page for page in range(len(best)) if page not in chosen]
            free = [page for page in chosen if page not in forced]
            assert best[free].min() >= best[others].max()
    out, _, counts = verified_sampling_attention(
        q, k, v, **settings, epsilon=1e-6, delta=0.1, base=4, signs=signs
    )
    dense = flash_attention(q[:1], k[:1], v[:1])
    assert (counts[0] == 90 - 5 * 8 - 2).all()  # everything else is drawn
    assert_close("out", out[:1], dense.double(), rms=4e-6, worst=1e-5)


def test_signs_find_a_key_that_bounds_of_pages_miss():
    torch.manual_seed(0)
    q, k, _ = draw(1, 8192, 1, 1, 64)
    k[0, 5000, 0] = 2 * q[0, 0, 0]
    settings = {"page": 32, "selected": 8, "initial": 1, "local": 1}
    pages = sign_pages(q, SignCodes.build(k), **settings, leftpad=None, used=None)
    assert 5000 // 32 in pages.flatten().tolist()


def test_signs_of_other_keys_are_refused():
    q, k, v = draw(1, 40, 2, 1, 16)
    with pytest.raises(ValueError, match=r"`signs\.codes`: expected"):
        verified_sampling_attention(q, k, v, signs=SignCodes.build(k[:, 1:]))
    with pytest.raises(TypeError, match="`signs`: expected SignCodes, got Tensor"):
        verified_sampling_attention(q, k, v, signs=k)
    with pytest.raises(ValueError, match="`signs`: pages are chosen by them or by `bounds`"):
        verified_sampling_attention(
            q, k, v, signs=SignCodes.build(k), bounds=pool_keys(k, units=units_of(32))
        )


def test_padding_changes_no_row(device, backend):
    q, k, v = draw(2, 150, 4, 2, 32, device=device)
    left = torch.tensor([0, 61], dtype=torch.int32, device=device)
    together = verified_sampling_attention(q, k, v, **SMALL, leftpad=left)
    alone = verified_sampling_attention(q[1:], k[1:, 61:], v[1:, 61:], **SMALL)
    for found, expected in zip(together, alone):
        assert_close("row", found[1:].float(), expected.double(), rms=4e-6, worst=1e-5)
    assert torch.equal(together[2][1:], alone[2])


@pytest.mark.parametrize("Hk", [2, 4])
def test_rows_behind_the_last_used_one_are_not_read(Hk, device, backend):
    """Memory to spare holds anything; a weight of 0 does not make NaN harmless."""
    q, k, v = draw(2, 80, 4, Hk, 32, device=device)
    used = torch.tensor([60, 33], dtype=torch.int32, device=device)
    expected = verified_sampling_attention(q, k, v, **SMALL, used=used)
    for b, n in enumerate(used.tolist()):
        k[b, n:], v[b, n:] = 1e4, torch.nan
    found = verified_sampling_attention(q, k, v, **SMALL, used=used)
    assert all(map(torch.equal, found, expected))


def test_equal_seeds_draw_equal_rows(device, backend):
    q, k, v = draw(1, 150, 2, 1, 16, device=device)
    a, b, c = (verified_sampling_attention(q, k, v, **SMALL, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    # and with each token others: errors do not add up over a text
    drawn = [
        verified_rows_reference(
            q[0, 0].cpu(), k[0, :n, 0].cpu(), torch.tensor([0]), page=8, base=20, deviations=1e-3,
            epsilon=1.0, seed=1, head=0, scale=1.0, tails="sampled",
        )[1].tolist()
        for n in (149, 150)
    ]  # fmt: skip
    assert len(set(drawn[0]) & set(drawn[1])) < 12


def test_it_compiles_without_a_break():
    q, k, v = draw(1, 100, 2, 1, 16)

    def run(q, k, v):
        return verified_sampling_attention(q, k, v, **SMALL)

    expected = run(q, k, v)
    with torch.no_grad():
        found = torch.compile(run, fullgraph=True)(q, k, v)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"q": torch.zeros(1, 2, 4, 8)}, ValueError, r"`q`: expected \[B 1 H D\]"),
        ({"q": torch.zeros(1, 1, 3, 8)}, ValueError, "`q`: expected a multiple of Hk=2 heads"),
        ({"q": torch.zeros(1, 1, 4, 8).double()}, TypeError, "`q`: expected dtype"),
        ({"v": torch.zeros(1, 9, 2, 8)}, ValueError, "`v`: expected"),
        ({"epsilon": 0.0}, ValueError, "`epsilon`: expected more than 0 and less than 1, got 0.0"),
        ({"delta": 1}, ValueError, "`delta`: expected more than 0 and less than 1, got 1"),
        ({"selected": 3}, ValueError, "`selected`: expected at least 4"),
        ({"page": 0}, ValueError, "`page`: expected at least 1"),
        ({"base": 1}, ValueError, "`base`: expected at least 2"),
        ({"tails": "short"}, ValueError, "`tails`: expected one of normal, sampled, got 'short'"),
        ({"seed": 1.0}, TypeError, "`seed`: expected an integer, got float"),
        ({"bounds": torch.zeros(1, 0, 2, 16)}, ValueError, "`bounds`: expected .* at least 1 pag"),
        ({"leftpad": torch.zeros(1)}, TypeError, "`leftpad`: expected dtype int32"),
        ({"used": torch.zeros(2, dtype=torch.int32)}, ValueError, "`used`: expected"),
        ({"k": torch.zeros(1, 40, 2, 8, requires_grad=True)}, ValueError, "without gradient"),
    ],
)
def test_wrong_arguments_are_named(changes, kind, message):
    k = torch.randn(1, 40, 2, 8)
    arguments = {"q": torch.zeros(1, 1, 4, 8), "k": k, "v": k} | changes
    with pytest.raises(kind, match=message):
        verified_sampling_attention(**arguments)
