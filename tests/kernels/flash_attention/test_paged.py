"""Attention over pages: equal to gathering them, whatever pages there are and where they lie."""

import pytest
import torch

from bitnet_triton import use_backend
from bitnet_triton.kernels import Mask, flash_attention
from bitnet_triton.kernels.flash_attention import decode
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.runtime import backend_objection
from bitnet_triton.testing import assert_close

pytestmark = pytest.mark.skipif(
    backend_objection("triton", torch.device("cpu")) is not None, reason="Triton cannot run here"
)

SCALE = 0.125


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def in_pages(rows, page_size, spare=3):
    """Return pages in which sequences [T Hk D] lie out of order, and their table.

    What no sequence uses is NaN: pages, places behind the last token, and places of the table.
    """
    counts = [-(-len(t) // page_size) for t in rows]
    table = torch.full((len(rows), max(counts) + 1), 2**30, dtype=torch.int32)
    pages = rows[0].new_full((sum(counts) + spare, page_size, *rows[0].shape[1:]), float("nan"))
    order = iter(torch.randperm(len(pages)).tolist())
    for b, (t, count) in enumerate(zip(rows, counts)):
        for i in range(count):
            table[b, i] = page = next(order)
            part = t[i * page_size : (i + 1) * page_size]
            pages[page, : len(part)] = part
    return pages, table


def draw(lengths, page_size, H=4, Hk=2, D=64, Dv=64, dtype=torch.float32):
    """Return the keys and the values of each sequence, their pages, and the table of both."""
    rows = [torch.randn(T, Hk, D + Dv).to(dtype) for T in lengths]
    pages, table = in_pages(rows, page_size)
    keys, values = zip(*[t.split((D, Dv), dim=-1) for t in rows])
    return keys, values, pages[..., :D], pages[..., D:], table


def packed_reference(q, keys, values, counts, **settings):
    """Attend to each sequence by itself; return out [R H D] and lse [H R]."""
    parts = [
        attention_reference(one[None], k[None], v[None], scale=SCALE, **settings)
        for one, k, v in zip(q.split(counts), keys, values)
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)


@pytest.fixture
def check(largest_error):
    """A function that compares one packed call with the reference over each sequence."""

    def check(counts, lengths, *, mask=None, page_size=16, H=4, softcap=None, **sizes):
        mask = mask or Mask()
        keys, values, k, v, table = draw(lengths, page_size, H=H, **sizes)
        q = torch.randn(sum(counts), H, k.shape[-1]).to(k.dtype)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        with use_backend("triton"):
            out, lse = flash_attention(
                q, k, v, mask=mask, scale=SCALE, softcap=softcap, cu_seqlens_q=starts,
                seqused_k=int32(*lengths), block_table=table, page_size=page_size, return_lse=True,
            )  # fmt: skip
        settings = {"mask": mask, "softcap": softcap}
        eager, _ = packed_reference(q, keys, values, counts, **settings)
        wide = ([t.double() for t in many] for many in (keys, values))
        exact, exact_lse = packed_reference(q.double(), *wide, counts, **settings)
        worst = None
        if out.dtype == torch.float32:
            each = zip(q.split(counts), keys, values)
            worst = max(
                largest_error(*(t[None] for t in one), scale=SCALE, **settings)
                for one in each
                if len(one[0])
            )
        assert_close("out", out, exact, eager=eager, worst=worst)
        seen = torch.isfinite(exact_lse)
        assert torch.equal(torch.isfinite(lse), seen)
        assert_close("lse", lse[seen], exact_lse[seen])

    return check


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(causal=False),
        Mask(window=40, sinks=5),
        Mask(window=700),
        Mask(window=24, sinks=100),
        Mask(causal=False, window=50, window_right=2, sinks=3),
    ],
    ids=str,
)
def test_sequences_of_one_of_few_and_of_many_queries_match_the_reference(mask, check):
    check([1, 0, 7, 1, 150, 1], [600, 9, 7, 1, 171, 1300], mask=mask)


@pytest.mark.parametrize(
    "sizes",
    [
        {"page_size": 4},
        {"page_size": 12, "H": 5, "Hk": 1},
        {"page_size": 256, "Hk": 4},
        {"page_size": 192},
        {"page_size": 32, "D": 80, "Dv": 96},
        {"page_size": 128, "dtype": torch.bfloat16, "D": 128, "Dv": 128},
        {"page_size": 64, "dtype": torch.float16, "softcap": 3.0},
    ],
    ids=str,
)
def test_pages_and_heads_of_every_size_match_the_reference(sizes, check):
    check([1, 33, 1], [520, 230, 3], **sizes)


@pytest.mark.parametrize("Tq", [1, 5, 40])
@pytest.mark.parametrize("who", ["triton", "reference"])
def test_a_batch_of_equal_lengths_is_that_batch_packed(Tq, who):
    lengths = int32(700, 41, 64)
    _, _, k, v, table = draw(lengths.tolist(), 32)
    q = torch.randn(3, Tq, 4, 64)
    settings = {"seqused_k": lengths, "block_table": table, "mask": Mask(window=300, sinks=2)}
    with use_backend(who):
        out, lse = flash_attention(q, k, v, return_lse=True, **settings)
        starts = torch.arange(4, dtype=torch.int32) * Tq
        packed, packed_lse = flash_attention(
            q.flatten(0, 1), k, v, cu_seqlens_q=starts, return_lse=True, **settings
        )
    assert_close("out", out.flatten(0, 1), packed.double(), rms=4e-6)
    assert_close("lse", lse.transpose(0, 1).flatten(1), packed_lse.double(), rms=4e-6)


def test_any_order_of_pages_gives_the_same_bits():
    lengths = int32(300, 77)
    _, _, k, v, table = draw(lengths.tolist(), 16)
    q = torch.randn(2, 1, 4, 64)
    order = torch.randperm(len(k))
    moved = torch.full_like(table, -1)
    for b, length in enumerate(lengths.tolist()):
        used = -(-length // 16)
        moved[b, :used] = order.argsort()[table[b, :used].long()].int()
    outs = [
        flash_attention(q, *pages, seqused_k=lengths, block_table=places)
        for pages, places in (((k, v), table), ((k[order], v[order]), moved))
    ]
    assert torch.equal(*outs)


def test_a_page_in_two_tables_is_read_by_both():
    keys, values, k, v, table = draw([40, 48], 16)
    table[1, :2] = table[0, :2]
    q = torch.randn(2, 1, 4, 64)
    out = flash_attention(q, k, v, scale=SCALE, seqused_k=int32(40, 48), block_table=table[:, :3])
    second = [torch.cat((t[0][:32], t[1][32:]))[None].double() for t in (keys, values)]
    exact, _ = attention_reference(q[1:].double(), *second, mask=Mask(), scale=SCALE)
    assert_close("out", out[1:], exact, rms=4e-6)


def test_rows_behind_the_last_sequence_give_zeros():
    _, _, k, v, table = draw([40, 20], 16)
    q = torch.randn(50, 4, 64)
    out, lse = flash_attention(
        q, k, v, cu_seqlens_q=int32(0, 1, 18), seqused_k=int32(40, 20), block_table=table,
        return_lse=True,
    )  # fmt: skip
    assert out[18:].eq(0).all()
    assert out[:18].ne(0).any(-1).all()
    assert lse[:, 18:].eq(float("-inf")).all()


def test_the_number_of_splits_changes_nothing_but_rounding(monkeypatch, check):
    for most in (1, 7, 64):
        monkeypatch.setattr(decode, "_MOST_SPLITS", most)
        monkeypatch.setattr(decode, "_KEYS_OF_SPLIT", 48)
        check([1, 1], [700, 3], mask=Mask(sinks=4, window=500))


def test_a_sink_logit_takes_part():
    keys, values, k, v, table = draw([40], 16)
    q, s_aux = torch.randn(1, 1, 4, 64), torch.randn(4)
    out = flash_attention(q, k, v, scale=SCALE, seqused_k=int32(40), block_table=table, s_aux=s_aux)
    exact, _ = attention_reference(
        *(t.double() for t in (q, keys[0][None], values[0][None])),
        mask=Mask(), scale=SCALE, s_aux=s_aux.double(),
    )  # fmt: skip
    assert_close("out", out, exact, rms=4e-6)


def test_it_compiles_into_one_graph():
    _, _, k, v, table = draw([40, 20], 16)
    q, used = torch.randn(2, 1, 4, 64), int32(40, 20)

    def attend(q, k, v, used, table):
        return flash_attention(q, k, v, seqused_k=used, block_table=table)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, used, table), attend(q, k, v, used, table))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seqused_k": None}, ValueError, "`seqused_k`: a block table needs"),
        ({"page_size": 8}, ValueError, "`page_size`: `k` has pages of 16 tokens, got 8"),
        ({"mask": Mask(dilation=2)}, ValueError, "no `dilation`"),
        ({"mask": Mask(pattern="local", block=4)}, ValueError, "no `pattern`"),
        ({"mask": Mask(global_tokens=(1,))}, ValueError, "no `global_tokens`"),
        ({"mask": Mask(dense_from=4)}, ValueError, "no `dense_from`"),
        ({"leftpad_k": int32(0, 0)}, ValueError, "`leftpad_k`: not with `block_table`"),
        ({"seqused_q": int32(1, 1)}, ValueError, "`seqused_q`: not with `block_table`"),
        ({"cu_seqlens_k": int32(0, 1, 2)}, ValueError, "`cu_seqlens_k`: not with"),
        ({"softcap": -1.0}, ValueError, "`softcap`: expected a positive"),
        ({"mask": "causal"}, TypeError, "`mask`: expected a Mask"),
        ({"seqused_k": int32(1, 1, 1)}, ValueError, r"`seqused_k`: expected \[B\] with B=2"),
        ({"block_table": torch.zeros(2, 3)}, TypeError, "`block_table`: expected dtype int32"),
        ({"block_table": None}, ValueError, "`page_size`: expected a `block_table`"),
    ],
)
def test_what_is_wrong_is_named(change, error, message):
    _, _, k, v, table = draw([40, 20], 16)
    settings = {"seqused_k": int32(40, 20), "block_table": table, "page_size": 16} | change
    with pytest.raises(error, match=message):
        flash_attention(torch.randn(2, 1, 4, 64), k, v, **settings)


def test_a_gradient_is_refused_by_name():
    _, _, k, v, table = draw([40, 20], 16)
    settings = {"seqused_k": int32(40, 20), "block_table": table}
    q = torch.randn(2, 1, 4, 64, requires_grad=True)
    with pytest.raises(ValueError, match="pages has no gradient"):
        flash_attention(q, k, v, **settings)
    with torch.no_grad():
        assert flash_attention(q, k, v, **settings).shape == q.shape
