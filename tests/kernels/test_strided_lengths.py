"""Lengths and tables of integers that are views with strides count as their values do."""

import pytest
import torch

from bitnet_triton.kernels import (
    HashTables,
    SparseBlocks,
    compress_blocks,
    flash_attention,
    linear_cross_entropy,
    lsh_sampling_attention,
    native_sparse_attention,
    pool_keys,
    quantised_attention,
    select_blocks,
    selected_block_attention,
    top_blocks,
)
from bitnet_triton.kernels.quantised_attention.codes import GROUP, KeyValueCodes
from bitnet_triton.kernels.top_blocks import Units

B, T, H, Hk, D = 3, 40, 4, 2, 32
LEFTPAD = torch.tensor([0, 7, 15], dtype=torch.int32)
USED = torch.tensor([40, 22, 31], dtype=torch.int32)
STARTS = torch.tensor([0, 40, 71, 120], dtype=torch.int32)
TABLE = torch.tensor([[4, 0, 7], [2, 8, 1], [3, 5, 6]], dtype=torch.int32)
BLOCKS, UNITS = SparseBlocks(8, 4, 16, 3, 1, 1, 12), Units("mean", 4, 8)


def strided(tensor):
    """Return a view of every other value of a tensor; those between are another's."""
    return torch.stack([tensor, tensor.flip(0)], -1)[..., 0]


class Inputs:
    """Queries, keys, values, and what calls take beside them."""

    def __init__(self):
        self.q, self.k, self.v = (torch.randn(B, T, n, D) for n in (H, Hk, Hk))
        self.packed = [x.flatten(0, 1) for x in (self.q, self.k, self.v)]
        self.pages = [torch.randn(9, 16, Hk, D) for _ in range(2)]
        self.blocks = torch.randint(0, 3, (B, T, Hk, 2), dtype=torch.int32)
        self.compressed, self.gates = torch.randn(B, 9, Hk, D), torch.rand(B, T, H, 3)
        self.weights = torch.rand(Hk, 8)
        self.hidden, self.head = torch.randn(6, 16), torch.randn(40, 16)
        self.codes = KeyValueCodes.empty(B, Hk, 2, D, 4, torch.device("cpu"), True)
        for row in range(B):
            self.codes.write(row, 0, *(torch.randn(Hk, 2 * GROUP, D) for _ in range(2)))
        self.tables = HashTables.build(self.k, bits=4, tables=8)

    def sample(self, tables, used):
        return lsh_sampling_attention(
            self.q[:, :1], self.k, self.v, tables, sinks=2, recent=4, used=used
        )

    def to_pages(self, queries, table, used):
        return flash_attention(
            self.q[:, :queries], *self.pages, block_table=table, seqused_k=used, page_size=16
        )

    def top(self, queries, **lengths):
        units = pool_keys(self.k, units=UNITS)
        return top_blocks(
            self.q[:, :queries], units, units=UNITS, block=16, selected=2, tokens=T, **lengths
        )


CALLS = {
    "flash leftpad_k": (lambda x, t: flash_attention(x.q, x.k, x.v, leftpad_k=t), LEFTPAD),
    "flash seqused_k": (lambda x, t: flash_attention(x.q[:, :1], x.k, x.v, seqused_k=t), USED),
    "flash seqused_q": (
        lambda x, t: flash_attention(x.q, x.k, x.v, seqused_q=t, seqused_k=USED), USED,
    ),
    "flash cu_seqlens": (
        lambda x, t: flash_attention(*x.packed, cu_seqlens_q=t, cu_seqlens_k=t), STARTS,
    ),
    "pages seqused_k": (lambda x, t: x.to_pages(1, TABLE, t), USED),
    "pages seqused_k, many": (lambda x, t: x.to_pages(20, TABLE, t), USED),
    "pages block_table": (lambda x, t: x.to_pages(1, t, USED), TABLE),
    "pages block_table, many": (lambda x, t: x.to_pages(20, t, USED), TABLE),
    "selected leftpad": (
        lambda x, t: selected_block_attention(x.q, x.k, x.v, x.blocks, block=16, leftpad=t),
        LEFTPAD,
    ),
    "compress leftpad": (
        lambda x, t: compress_blocks(x.k, weights=x.weights, block=8, stride=4, leftpad=t), LEFTPAD,
    ),
    "select leftpad": (
        lambda x, t: select_blocks(x.q, x.compressed, blocks=BLOCKS, tokens=T, leftpad=t), LEFTPAD,
    ),
    "native leftpad": (
        lambda x, t: native_sparse_attention(
            x.q, x.k, x.v, x.compressed, x.compressed, x.gates, blocks=BLOCKS, leftpad=t
        ),
        LEFTPAD,
    ),
    "tables used": (lambda x, t: x.sample(x.tables, t), USED),
    "tables leftpad": (
        lambda x, t: x.sample(HashTables.build(x.k, bits=4, tables=8, leftpad=t), USED), LEFTPAD,
    ),
    "pool leftpad": (lambda x, t: pool_keys(x.k, units=UNITS, leftpad=t), LEFTPAD),
    "top leftpad": (lambda x, t: x.top(T, leftpad=t), LEFTPAD),
    "top seqused": (lambda x, t: x.top(1, seqused=t), USED),
    "codes used": (lambda x, t: quantised_attention(x.q[:, :2], x.codes, t), USED),
    "labels": (
        lambda x, t: linear_cross_entropy(x.hidden, x.head, t), torch.tensor([3, 39, 0, 7, 7, 21]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_views_count_as_their_values(name):
    call, lengths = CALLS[name]
    inputs = Inputs()
    expected, found = call(inputs, lengths), call(inputs, strided(lengths))
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (expected, found))):
        assert torch.equal(a, b)


def test_one_label_for_all_is_no_read_beyond_it():
    inputs = Inputs()
    labels = torch.tensor([3])
    found = linear_cross_entropy(inputs.hidden, inputs.head, labels.expand(6))
    assert torch.equal(found, linear_cross_entropy(inputs.hidden, inputs.head, labels.repeat(6)))


def test_gradients_of_strided_labels():
    inputs, labels = Inputs(), torch.tensor([3, 39, 0, 7, 7, 21])
    results = []
    for each in (labels, strided(labels)):
        tensors = [x.clone().requires_grad_() for x in (inputs.hidden, inputs.head)]
        linear_cross_entropy(*tensors, each).sum().backward()
        results.append([x.grad for x in tensors])
    for a, b in zip(*results):
        assert torch.equal(a, b)
