"""Rotary embeddings against float64, and bit by bit against transformers, on every backend."""

import pytest
import torch
from transformers.models.bitnet.modeling_bitnet import apply_rotary_pos_emb

from bitnet_triton.kernels import apply_rotary, rotary_and_store
from bitnet_triton.kernels.rotary.reference import rotary_backward_reference, rotary_reference
from bitnet_triton.runtime import backend_objection, capture
from bitnet_triton.testing import RMS_LIMITS, assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, T, H, D; the last with more heads than a block holds
SHAPES = [(1, 1, 1, 2), (2, 3, 5, 6), (1, 7, 20, 128), (3, 1, 33, 100)]

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]


def angles(shape, dtype, device="cpu"):
    """Return cosines and sines whose halves differ: nothing may read one for the other."""
    angle = 6.3 * torch.rand(shape, device=device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def run(function, x, cos, sin, dy, dtype):
    x = x.detach().to(dtype, copy=True).requires_grad_()
    y = function(x, cos.to(dtype), sin.to(dtype))
    y.backward(dy.to(dtype))
    return {"y": y, "dx": x.grad}


def magnitudes(x, cos, sin, dy):
    """Return the sums of what is added up in each element, without signs."""
    x, cos, sin, dy = (t.double().abs() for t in (x, cos.unsqueeze(2), sin.unsqueeze(2), dy))
    half = x.shape[-1] // 2
    return {"y": x * cos + x.roll(half, -1) * sin, "dx": dy * cos + (dy * sin).roll(half, -1)}


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device, backend):
    B, T, _, D = shape
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    cos, sin = angles((B, T, D), dtype, device)

    ours = run(apply_rotary, x, cos, sin, dy, dtype)
    eager = run(rotary_reference, x, cos, sin, dy, dtype)
    exact = run(rotary_reference, x, cos, sin, dy, torch.float64)

    for name, size in magnitudes(x, cos, sin, dy).items():
        # two products and their sum are rounded: where few elements nearly cancel, that is more
        # than a thousandth of them in float16, though no more of what they were made of
        rms = RMS_LIMITS[dtype] * max(1.0, (size.norm() / exact[name].norm()).item())
        assert_close(name, ours[name], exact[name], eager=eager[name], rms=rms)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_transformers_bit_by_bit(shape, dtype, device, backend):
    B, T, _, D = shape
    q, dq = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    cos, sin = angles((B, T, D), dtype, device)

    def theirs(x, cos, sin):
        return apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0]

    ours = run(apply_rotary, q, cos, sin, dq, dtype)
    expected = run(theirs, q, cos, sin, dq, dtype)
    assert torch.equal(ours["y"], expected["y"])
    assert torch.equal(ours["dx"], expected["dx"])


def test_one_row_of_angles_serves_a_batch_of_views(device, backend):
    qkv = torch.randn(2, 5, 9, 24, device=device)
    cos, sin = angles((1, 5, 16), torch.float32, device)
    for x in (qkv[:, :, 2:6, 3:19], qkv[..., :16].transpose(2, 3)[:, :, :16].transpose(2, 3)):
        assert torch.equal(apply_rotary(x, cos, sin), rotary_reference(x, cos, sin))
    x, wide = qkv[..., :16], torch.randn(1, 5, 32, device=device)
    spread = qkv[..., ::2]  # heads of 12 with gaps
    for value, c in ((x, wide[..., ::2]), (spread, wide[..., :12])):
        assert torch.equal(apply_rotary(value, c, c), rotary_reference(value, c, c))


def test_turning_back_gives_the_input(device, backend):
    x = torch.randn(2, 3, 4, 16, device=device, requires_grad=True)
    cos, sin = (a.repeat(1, 1, 2) for a in angles((2, 3, 8), x.dtype, device))
    y = apply_rotary(x, cos, sin)
    for _ in range(2):
        (back,) = torch.autograd.grad(y, x, y.detach(), retain_graph=True)
        torch.testing.assert_close(back, x.detach())


def test_the_reference_passes_gradcheck():
    x, cos, sin = (
        torch.randn(s, dtype=torch.float64) for s in [(2, 3, 2, 6), (1, 3, 6), (1, 3, 6)]
    )
    assert torch.autograd.gradcheck(lambda x: rotary_reference(x, cos, sin), (x.requires_grad_(),))
    y = rotary_reference(x, cos, sin)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(rotary_backward_reference(torch.ones_like(y), cos, sin), dx)


def test_empty_input_gives_empty_output(device, backend):
    cos, sin = angles((1, 0, 8), torch.float32, device)
    assert apply_rotary(torch.randn(2, 0, 3, 8, device=device), cos, sin).shape == (2, 0, 3, 8)
    caches = torch.zeros(2, 2, 4, 1, 8, device=device)
    slots = torch.zeros(2, dtype=torch.int32, device=device)
    qkv = torch.randn(2, 0, 5, 8, device=device)
    assert rotary_and_store(qkv, cos, sin, *caches, slots).shape == (2, 0, 3, 8)
    assert not caches.any()


class Store:
    """Heads, a table of angles and caches for ``rotary_and_store``."""

    def __init__(self, dtype, device, B=3, T=2, H=4, Hk=2, D=16, C=7, P=40, heads_first=False):
        self.B, self.T, self.H, self.Hk, self.C = B, T, H, Hk, C
        self.qkv = torch.randn(B, T, H + 2 * Hk, D, device=device).to(dtype)
        self.table = angles((P, D), dtype, device)
        shape = (B, Hk, C, D) if heads_first else (B, C, Hk, D)
        self.caches = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
        if heads_first:
            self.caches = [cache.transpose(1, 2) for cache in self.caches]

    def tensor(self, *values):
        return torch.tensor(values, dtype=torch.int32, device=self.qkv.device)

    def expected(self, slots, positions):
        """Compute token by token what the op does."""
        q, k, v = self.qkv.split([self.H, self.Hk, self.Hk], dim=2)
        k_cache, v_cache = (cache.clone() for cache in self.caches)
        rotated = torch.empty_like(q)
        for b in range(self.B):
            for t in range(self.T):
                angle = [a[max(positions[b] + t, 0)].view(1, 1, -1) for a in self.table]
                rotated[b, t] = rotary_reference(q[b : b + 1, t : t + 1], *angle)[0, 0]
                slot = slots[b] + t
                if 0 <= slot < self.C:
                    k_cache[b, slot] = rotary_reference(k[b : b + 1, t : t + 1], *angle)[0, 0]
                    v_cache[b, slot] = v[b, t]
        return rotated, k_cache, v_cache


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_go_to_their_slots_turned_by_their_positions(dtype, heads_first, device, backend):
    store = Store(dtype, device, heads_first=heads_first)
    # apart, from padding on, and partly outside of the cache at either end
    slots, positions = (3, -1, 6), (20, -1, 5)
    expected = store.expected(slots, positions)
    q = rotary_and_store(
        store.qkv, *store.table, *store.caches, store.tensor(*slots),
        positions=store.tensor(*positions),
    )  # fmt: skip
    for value, wanted in zip((q, *store.caches), expected):
        assert torch.equal(value, wanted)


def test_positions_are_the_slots_unless_they_are_given(device, backend):
    store = Store(torch.float32, device)
    slots = (0, 4, 2)
    expected = store.expected(slots, slots)
    q = rotary_and_store(store.qkv, *store.table, *store.caches, store.tensor(*slots))
    for value, wanted in zip((q, *store.caches), expected):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("rows", [1, 3])
def test_angles_of_each_token_do_instead_of_a_table(rows, device, backend):
    store = Store(torch.bfloat16, device)
    slots = store.tensor(1, 5, 0)
    positions = torch.arange(9, 9 + rows, dtype=torch.int32, device=device)
    places = positions.long()[:, None] + torch.arange(2, device=device)
    by_token = [table[places] for table in store.table]
    before = [cache.clone() for cache in store.caches]
    q = rotary_and_store(
        store.qkv, *store.table, *store.caches, slots, positions=positions.expand(3).contiguous()
    )
    again = rotary_and_store(store.qkv, *by_token, *before, slots)
    assert torch.equal(again, q)
    assert all(map(torch.equal, before, store.caches))


def test_views_of_larger_tensors_are_read_and_written_in_place(device, backend):
    store = Store(torch.float32, device, D=16)
    slots = (3, 1, 5)
    expected = store.expected(slots, slots)
    wide = [torch.zeros(3, 9, 3, 24, device=device) for _ in range(2)]
    views = [w[:, 1:8, 1:, 4:20].copy_(cache) for w, cache in zip(wide, store.caches)]
    spread = torch.stack((store.qkv, store.qkv), -1)[..., 0]
    tables = [torch.stack((table, table), -1)[..., 0] for table in store.table]
    gaps = torch.stack((store.tensor(*slots),) * 2, 1)[:, 0]
    q = rotary_and_store(spread, *tables, *views, gaps, positions=gaps)
    for value, wanted in zip((q, *views), expected):
        assert torch.equal(value, wanted)
    for w, view in zip(wide, views):
        assert w.square().sum().isclose(view.square().sum())


def test_keys_and_values_may_lie_in_one_tensor(device, backend):
    store = Store(torch.float32, device)
    slots = (3, 1, 5)
    expected = store.expected(slots, slots)
    both = torch.stack(store.caches, 2)
    q = rotary_and_store(store.qkv, *store.table, *both.unbind(2), store.tensor(*slots))
    for value, wanted in zip((q, *both.unbind(2)), expected):
        assert torch.equal(value, wanted)


def test_a_position_beyond_the_table_gives_nan_and_leaves_the_others(device, backend):
    store = Store(torch.float32, device, P=6)
    slots, positions = (0, 0, 0), (5, 0, 1)
    # token 0 of row 0 is at the last position, token 1 beyond it
    q = rotary_and_store(
        store.qkv, *store.table, *store.caches, store.tensor(*slots),
        positions=store.tensor(*positions),
    )  # fmt: skip
    assert q[0, 1].isnan().all()
    assert store.caches[0][0, 1].isnan().all()
    assert not q.flatten(0, 1)[[0, 2, 3, 4, 5]].isnan().any()
    assert not store.caches[0][:, 0].isnan().any()
    assert torch.equal(store.caches[1][0, 1], store.qkv[0, 1, 6:])


def test_nothing_requires_a_gradient_and_autograd_sees_the_change(device, backend):
    store = Store(torch.float32, device)
    weight = torch.ones_like(store.caches[0], requires_grad=True)
    product = (weight * store.caches[0]).sum()
    q = rotary_and_store(
        store.qkv.requires_grad_(), *store.table, *store.caches, store.tensor(0, 0, 0)
    )
    assert not q.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_recorded_launch_follows_slots_and_positions():
    if (objection := backend_objection("triton", torch.device("cpu"))) is not None:
        pytest.skip(objection)
    from bitnet_triton.kernels.rotary.decode import launch_rotary_and_store

    store = Store(torch.bfloat16, "cpu", T=1)
    slots, positions = store.tensor(0, 0, 0), store.tensor(0, 0, 0)
    with capture(torch.device("cpu")) as graph:
        q = launch_rotary_and_store(store.qkv, *store.table, *store.caches, slots, positions)
    slots += store.tensor(3, 1, 6)
    positions += store.tensor(30, 1, 4)
    store.qkv.normal_()
    expected = store.expected(slots.tolist(), positions.tolist())
    graph.replay()
    for value, wanted in zip((q, *store.caches), expected):
        assert torch.equal(value, wanted)


def test_is_traced_as_one_op():
    x = torch.randn(2, 3, 4, 8, requires_grad=True)
    cos, sin = angles((1, 3, 8), torch.float32)
    compiled = torch.compile(apply_rotary, fullgraph=True, backend="aot_eager")
    y = compiled(x, cos, sin)
    expected = apply_rotary(x, cos, sin)
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    (ours,), (wanted,) = (torch.autograd.grad(value, x, dy) for value in (y, expected))
    assert torch.equal(ours, wanted)


def test_storing_is_traced_as_one_op_that_changes_the_caches():
    store = Store(torch.float32, "cpu")
    slots = (3, 1, 5)
    expected = store.expected(slots, slots)

    def step(qkv, cos, sin, k_cache, v_cache, slots):
        q = rotary_and_store(qkv + 0, cos, sin, k_cache, v_cache, slots)
        return q, k_cache.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, total = compiled(store.qkv, *store.table, *store.caches, store.tensor(*slots))
    for value, wanted in zip((q, *store.caches), expected):
        assert torch.equal(value, wanted)
    assert torch.equal(total, expected[1].sum())


X, ROW = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], ROW, ROW), TypeError, "`x`: expected a torch.Tensor, got list"),
        ((X.int(), ROW, ROW), TypeError, "`x`: expected dtype"),
        ((X[0], ROW, ROW), ValueError, r"`x`: expected \[B T H D\], got \[2, 3, 4\]"),
        ((X[..., :3], ROW, ROW), ValueError, "`x`: expected heads of an even size D, got 3"),
        ((X, 1.0, ROW), TypeError, "`cos`: expected a torch.Tensor"),
        ((X, ROW, ROW.half()), TypeError, "`sin`: expected dtype float32, got float16"),
        ((X, ROW[:, :1], ROW), ValueError, r"`cos`: expected \[B or 1, T, D\] with B=1, T=2, D=4"),
        ((X, ROW[0], ROW), ValueError, r"`cos`: .* got \[2, 4\]"),
        ((X, ROW, ROW.expand(3, 2, 4)), ValueError, r"`sin`: .* got \[3, 2, 4\]"),
        ((X, ROW, ROW.to("meta")), ValueError, "`sin`: expected a tensor on cpu"),
        ((X, ROW.clone().requires_grad_(), ROW), ValueError, "`cos`: .* without gradient"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        apply_rotary(*arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"qkv": [1.0]}, TypeError, "`qkv`: expected a torch.Tensor, got list"),
        ({"qkv": torch.ones(1, 2, 5, 4).int()}, TypeError, "`qkv`: expected dtype"),
        ({"qkv": torch.ones(2, 5, 4)}, ValueError, r"`qkv`: expected \[B T heads D\]"),
        ({"qkv": torch.ones(1, 2, 5, 3)}, ValueError, "`qkv`: expected heads of an even size"),
        ({"qkv": torch.ones(1, 2, 4, 4)}, ValueError, r"`qkv`: .* H at least 1, Hk=2"),
        ({"cos": 1.0}, TypeError, "`cos`: expected a torch.Tensor"),
        ({"cos": torch.ones(9, 3)}, ValueError, r"`cos`: expected \[P D\] with P=9, D=4"),
        ({"sin": torch.ones(8, 4)}, ValueError, r"`sin`: expected \[P D\] with P=9, D=4"),
        ({"sin": torch.ones(9, 4).half()}, TypeError, "`sin`: expected dtype float32"),
        ({"cos": torch.ones(0, 4)} | {"sin": torch.ones(0, 4)}, ValueError, "at least one posit"),
        ({"cos": ROW}, ValueError, r"`sin`: expected \[B or 1, T, D\]"),
        ({"cos": ROW, "sin": ROW, "positions": torch.ones(1).int()}, ValueError, "expected a tab"),
        ({"k_cache": torch.ones(1, 6, 2, 4).half()}, TypeError, "`k_cache`: expected dtype flo"),
        ({"k_cache": torch.ones(2, 6, 2, 4)}, ValueError, r"`k_cache`: .* B=1, D=4"),
        ({"k_cache": torch.ones(1, 6, 0, 4)}, ValueError, "`k_cache`: expected at least one head"),
        ({"k_cache": torch.ones(1, 6, 2, 8)[..., ::2]}, ValueError, "`k_cache`: .* contiguous"),
        ({"v_cache": torch.ones(1, 5, 2, 4)}, ValueError, r"`v_cache`: .* C=6, Hk=2"),
        ({"v_cache": torch.ones(1, 6, 2, 4, device="meta")}, ValueError, "`v_cache`: .* on cpu"),
        ({"slots": torch.ones(1)}, TypeError, "`slots`: expected dtype int32"),
        ({"slots": torch.ones(2).int()}, ValueError, r"`slots`: expected \[B\] with B=1"),
        ({"positions": torch.ones(2).int()}, ValueError, r"`positions`: expected \[B\] with B=1"),
        ({"positions": 3}, TypeError, "`positions`: expected a torch.Tensor"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_store_are_named(changed, error, message):
    arguments = {
        "qkv": torch.ones(1, 2, 5, 4), "cos": torch.ones(9, 4), "sin": torch.ones(9, 4),
        "k_cache": torch.ones(1, 6, 2, 4), "v_cache": torch.ones(1, 6, 2, 4),
        "slots": torch.ones(1).int(), "positions": None,
    } | changed  # fmt: skip
    with pytest.raises(error, match=message):
        rotary_and_store(**arguments)
