"""One token against compressed blocks that several programs read, and the blocks that it chooses.

Launched directly: what no row may read is NaN.
"""

import pytest
import torch

from bitnet_triton.kernels import SparseBlocks
from bitnet_triton.kernels.flash_attention import decode as flash_decode
from bitnet_triton.kernels.native_sparse.decode import launch_compressed_decode
from bitnet_triton.kernels.native_sparse.reference import compressed_attention_reference
from bitnet_triton.runtime.launch import capture, record_launches
from bitnet_triton.testing import assert_close

# most of what is chosen is so by its score
SMALL = SparseBlocks(block=8, stride=4, selection=16, selected=20, initial=1, local=2, window=20)
ODD = SparseBlocks(6, 2, 10, 20, 0, 1, 9)  # strides of a block are no power of two
EQUAL = SparseBlocks(4, 4, 4, 20, 1, 1, 8)
# H, Hk, D, Dv
SHAPES = [(4, 2, 16, 16), (5, 1, 24, 40), (16, 1, 64, 32)]
ROOM = 1500  # tokens that there may be
# the first token of each row, and one past its last one: long, near the ends of parts, few, none
FIRST = (0, 37, 1200, 0, 0, 3, 0, 5, 20, 40)
END = (1500, 1444, 1500, 512, 516, 1027, 9, 12, 21, 40)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def small_parts(monkeypatch):
    """Make parts of so few keys that short texts have several."""
    monkeypatch.setattr(flash_decode, "_KEYS_OF_SPLIT", 60)
    monkeypatch.setattr(flash_decode, "_KEYS_OF_SPLIT_ON_GPU", 60)


def draw(H, Hk, D, Dv, blocks, dtype=torch.float32, B=3):
    """Return q, and k and v as a memory keeps them: by head."""
    N = blocks.compressed(ROOM)
    q = 2 * torch.randn(B, 1, H, D, dtype=dtype)
    k, v = (torch.randn(B, Hk, N, size, dtype=dtype).transpose(1, 2) for size in (D, Dv))
    return q, k, v


def step(q, k, v, blocks, left, used, **more):
    return launch_compressed_decode(
        q, k, v, blocks=blocks, scale=q.shape[-1] ** -0.5, tokens=ROOM, leftpad=left, used=used,
        **more,
    )  # fmt: skip


def attend(q, k, v, blocks, tokens, dtype):
    q, k, v = (t.to(dtype) for t in (q, k, v))
    return compressed_attention_reference(
        q, k, v, blocks=blocks, scale=q.shape[-1] ** -0.5, before=tokens - 1
    )[0]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.backends("triton")
@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", [SMALL, ODD, EQUAL, SparseBlocks()],
                         ids=["overlapping", "odd", "equal", "paper"])  # fmt: skip
@pytest.mark.parametrize("most", [1, 3, 64])
def test_parts_together_match_the_reference(
    most, blocks, shape, dtype, device, backend, check_choice, monkeypatch
):
    monkeypatch.setattr(flash_decode, "_MOST_SPLITS", most)
    q, k, v = draw(*shape, blocks, dtype, B=len(END))
    lengths = [end - first for first, end in zip(FIRST, END)]
    for row, tokens in enumerate(lengths):
        k[row, blocks.compressed(tokens) :] = v[row, blocks.compressed(tokens) :] = float("nan")
    given = (t.to(device) for t in (q, k, v))
    left, used = int32(*FIRST).to(device), int32(*END).to(device)
    out, indices = (t.cpu() for t in step(*given, blocks, left, used))
    exact, eager = torch.zeros_like(out, dtype=torch.float64), torch.zeros_like(out)
    for row, tokens in enumerate(lengths):
        N, at = blocks.compressed(tokens), slice(row, row + 1)
        one = q[at], k[at, :N], v[at, :N]
        if N > 0:
            exact[at], eager[at] = (attend(*one, blocks, tokens, d) for d in (torch.float64, dtype))
        else:
            assert not out[row].any()
        if tokens > 0:
            check_choice(indices[at], one[0], one[1], blocks, tokens)
        else:
            assert (indices[row] == -1).all()
    # rows of one query are small samples of what the reference is off by
    error = (eager.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert_close("out", out, exact, eager=eager, worst=4 * error.item())


@pytest.mark.usefixtures("small_parts")
@pytest.mark.backends("triton")
def test_without_a_choice_attention_is_the_same(device, backend):
    q, k, v = (t.to(device) for t in draw(4, 2, 16, 16, SMALL))
    lengths = [int32(*values).to(device) for values in ((0, 3, 9), (1500, 900, 12))]
    out, indices = step(q, k, v, SMALL, *lengths, selects=False)
    assert torch.equal(out, step(q, k, v, SMALL, *lengths)[0])
    assert indices.numel() == 0


@pytest.mark.usefixtures("small_parts")
@pytest.mark.backends("triton")
def test_a_row_does_not_depend_on_its_batch(device, backend):
    q, k, v = (t.to(device) for t in draw(4, 2, 16, 16, SMALL))
    left, used = int32(0, 3, 9).to(device), int32(1500, 900, 12).to(device)
    together = step(q, k, v, SMALL, left, used)
    for row in range(3):
        at = slice(row, row + 1)
        alone = step(q[at], k[at], v[at], SMALL, left[at], used[at])
        assert all(torch.equal(one, both[at]) for one, both in zip(alone, together))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.backends("triton")
def test_a_recorded_step_serves_later_lengths(device, backend):
    q, k, v = (t.to(device) for t in draw(4, 2, 16, 16, SMALL))
    left, used = int32(0, 0, 0).to(device), int32(1, 5, 600).to(device)
    step(q, k, v, SMALL, left, used)  # a kernel is loaded before it is captured
    with capture(torch.device(device)) as graph:
        found = step(q, k, v, SMALL, left, used)
    for starts, ends in (((0, 2, 7), (1500, 1000, 800)), ((30, 0, 1499), (38, 1024, 1500))):
        left.copy_(int32(*starts))
        used.copy_(int32(*ends))
        q.copy_(torch.randn(q.shape))
        graph.replay()
        anew = step(q, k, v, SMALL, left, used)
        assert all(torch.equal(a, b) for a, b in zip(found, anew))


def test_one_key_head_occupies_many_programs():
    """Counted, not timed; one sequence of the published 2B model's heads at 65536 tokens."""
    meta = {"device": "meta", "dtype": torch.bfloat16}
    blocks = SparseBlocks()
    q, k = torch.empty(1, 1, 20, 128, **meta), torch.empty(1, 4095, 5, 128, **meta)
    with record_launches() as launches:
        launch_compressed_decode(q, k, k, blocks=blocks, scale=0.1, tokens=65536)
    grids = {launch.kernel.__name__: launch.grid for launch in launches}
    assert grids["_compressed_attention_decode_kernel"] == (32, 5, 1)
    assert grids["_compressed_attention_take_kernel"] == (5, 1)
