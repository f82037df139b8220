"""Agreement with an independent implementation, in what both of them express.

It scores blocks by mean logits, has a learned key and value beside the compressed ones, shows a
block from the token behind its last one on, and one more key in a window. With one query head a key
head, blocks that do not overlap and as long selection blocks, the same blocks are chosen.
"""

import pytest
import torch

from bitnet_triton.kernels import SparseBlocks, compress_blocks, native_sparse_attention
from bitnet_triton.kernels.native_sparse.arguments import SparseCall
from bitnet_triton.kernels.native_sparse.attend import compressed_attention

peer = pytest.importorskip(
    "native_sparse_attention_pytorch", reason="needs native-sparse-attention-pytorch"
)

pytestmark = pytest.mark.peer

H, D, T, BLOCK, WINDOW = 3, 16, 76, 4, 7


class Mean(torch.nn.Module):
    """Their compression of a block [B H N L D]."""

    def forward(self, x):
        return x.mean(-2)


@pytest.fixture
def theirs():
    module = peer.SparseAttention(
        dim=H * D, dim_head=D, heads=H, sliding_window_size=WINDOW, compress_block_size=BLOCK,
        compress_block_sliding_stride=BLOCK, selection_block_size=BLOCK, num_selected_blocks=3,
        causal=True, norm=False, compress_mlp=Mean(),
    )  # fmt: skip
    with torch.no_grad():
        module.combine_heads.weight.copy_(torch.eye(H * D))
        for places in (module.k_intrablock_positions, module.v_intrablock_positions):
            places.normal_()
    return module


def open_gate(module, branch):
    gates = module.to_strategy_combine[0].bias
    with torch.no_grad():
        gates.fill_(-60.0).view(-1, 3)[:, branch] = 60.0


def tensors(module, x):
    """Return q, k and v [B T H D], and q and k rotated."""
    q, k, v = (module.split_heads(t) for t in module.to_qkv(x).split(module.qkv_split, dim=-1))
    rotated = module.rotary_emb.rotate_queries_with_cached_keys(q, k)
    return [t.transpose(1, 2) for t in (q, k, v, *rotated)]


def compressed(module, k, v):
    places = module.k_intrablock_positions, module.v_intrablock_positions
    return [
        compress_blocks(t.contiguous(), block=BLOCK, stride=BLOCK, positions=p)
        for t, p in zip((k, v), places)
    ]


def test_compressed_attention_agrees(theirs):
    open_gate(theirs, 0)
    x = torch.randn(2, T, H * D)
    q, k, v, _, _ = tensors(theirs, x)
    call = SparseCall(SparseBlocks(BLOCK, BLOCK, BLOCK, 4, 0, 1, 1), D**-0.5, T)
    out, lse, _ = compressed_attention(q, *compressed(theirs, k, v), call)
    # beside what a query sees stands a key of zeros, whose value is zeros
    out = out * lse.sigmoid().transpose(1, 2)[..., None]
    alike = (torch.arange(T) + 1) % BLOCK != 0  # rows that see the same blocks
    torch.testing.assert_close(theirs(x)[:, alike], out.flatten(2)[:, alike], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("branch", [1, 2], ids=["chosen blocks", "window"])
def test_the_other_branches_agree(branch, theirs):
    open_gate(theirs, branch)
    x = torch.randn(2, T, H * D)
    q, k, v, rotated_q, rotated_k = tensors(theirs, x)
    blocks = SparseBlocks(BLOCK, BLOCK, BLOCK, selected=4, initial=0, local=1, window=WINDOW + 1)
    kc, vc = compressed(theirs, k, v)
    gates = torch.zeros(2, T, H, 3)
    gates[..., branch] = 1
    # blocks are chosen by queries and keys that are not rotated
    _, indices = native_sparse_attention(q, k, v, kc, vc, gates, blocks=blocks, return_indices=True)
    out = native_sparse_attention(
        rotated_q, rotated_k, v, kc, vc, gates, blocks=blocks, indices=indices
    )
    torch.testing.assert_close(theirs(x), out.flatten(2), atol=1e-5, rtol=1e-4)
