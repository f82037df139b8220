"""Pages are written and copied as the reference does it, and nothing beside them changes."""

import pytest
import torch

from bitnet_triton.kernels import copy_pages, write_pages
from bitnet_triton.kernels.kv_pages.reference import copy_pages_reference, write_pages_reference

pytestmark = [
    pytest.mark.usefixtures("forced_backend"),
    pytest.mark.backends("triton", "reference"),
]


def draw(T, device, P=6, page_size=4, Hk=3, D=16, Dv=24, dtype=torch.float32):
    """Return k_pages, v_pages, k and v."""
    shapes = [(P, page_size, Hk, D), (P, page_size, Hk, Dv), (T, Hk, D), (T, Hk, Dv)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("integer", [torch.int64, torch.int32], ids=str)
def test_tokens_land_in_their_slots_and_nowhere_else(backend, dtype, integer, device):
    k_pages, v_pages, k, v = draw(9, device, dtype=dtype)
    slots = torch.randperm(24, device=device)[:9].to(integer)
    slots[2], slots[5] = -1, 24
    expected = [k_pages.clone(), v_pages.clone()]
    for token, slot in enumerate(slots.tolist()):
        if 0 <= slot < 24:
            expected[0][slot // 4, slot % 4] = k[token]
            expected[1][slot // 4, slot % 4] = v[token]
    write_pages(k_pages, v_pages, k, v, slots)
    assert torch.equal(k_pages, expected[0])
    assert torch.equal(v_pages, expected[1])


def test_pages_and_tokens_may_have_any_strides(backend, device):
    """As in a memory of all layers, and as projections and transformers' cache give them."""
    memory = torch.zeros(6, 2, 2, 4, 3, 16, device=device)
    qkv = torch.randn(5, 9, 16, device=device)
    k, v = qkv[:, 3:6], torch.randn(3, 5, 16, device=device).transpose(0, 1)
    slots = torch.tensor([7, 0, 23, 12, 3], device=device)
    write_pages(memory[:, 1, 0], memory[:, 1, 1], k, v, slots)
    expected = [torch.zeros(6, 4, 3, 16, device=device) for _ in range(2)]
    write_pages_reference(*expected, k, v, slots)
    assert torch.equal(memory[:, 1, 0], expected[0])
    assert torch.equal(memory[:, 1, 1], expected[1])
    assert memory[:, 0].eq(0).all()


@pytest.mark.parametrize("shape", [(6, 3), (5, 4, 3, 700)], ids=str)
def test_whole_pages_are_copied(backend, shape, device):
    pages = torch.randn(shape, device=device)
    pairs = torch.tensor([[0, 3], [0, 2], [-1, 1], [1, shape[0]]], device=device)
    expected = pages.clone()
    expected[3], expected[2] = pages[0], pages[0]
    copy_pages(pages, pairs)
    assert torch.equal(pages, expected)
    copy_pages_reference(expected, pairs)
    assert torch.equal(pages, expected)


def test_nothing_to_do_changes_nothing(backend, device):
    k_pages, v_pages, k, v = draw(0, device)
    before = k_pages.clone()
    write_pages(k_pages, v_pages, k, v, torch.zeros(0, dtype=torch.int64, device=device))
    copy_pages(k_pages, torch.zeros(0, 2, dtype=torch.int64, device=device))
    assert torch.equal(k_pages, before)


def test_a_compiled_graph_writes_too():
    k_pages, v_pages, k, v = draw(3, "cpu")
    expected = [k_pages.clone(), v_pages.clone()]
    slots = torch.tensor([5, 0, 23])
    write_pages_reference(*expected, k, v, slots)
    torch.compile(write_pages, fullgraph=True, backend="aot_eager")(k_pages, v_pages, k, v, slots)
    assert torch.equal(k_pages, expected[0])
    assert torch.equal(v_pages, expected[1])


@pytest.mark.parametrize(
    ("place", "wrong", "error", "message"),
    [
        (0, torch.zeros(6, 4, 3, 17), ValueError, r"`k_pages`: expected \[P page Hk D\]"),
        (0, torch.zeros(6, 4, 3, 32)[..., ::2], ValueError, "`k_pages`: expected heads that"),
        (1, torch.zeros(5, 4, 3, 24), ValueError, "`v_pages`: expected"),
        (1, torch.zeros(6, 4, 3, 24).half(), TypeError, "`v_pages`: expected dtype float32"),
        (2, torch.zeros(9, 3, 16, dtype=torch.int8), TypeError, "`k`: expected dtype"),
        (3, torch.zeros(8, 3, 24), ValueError, "`v`: expected"),
        (4, torch.zeros(9), TypeError, "`slots`: expected dtype int64 or int32"),
        (4, torch.zeros(8, dtype=torch.int64), ValueError, r"`slots`: expected \[T\] with T=9"),
    ],
)
def test_what_is_wrong_with_a_write_is_named(place, wrong, error, message):
    inputs = [*draw(9, "cpu"), torch.arange(9)]
    inputs[place] = wrong
    with pytest.raises(error, match=message):
        write_pages(*inputs)


def test_what_is_wrong_with_a_copy_is_named():
    pairs = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match=r"`pages`: expected \[P ...\]"):
        copy_pages(torch.zeros(4), pairs)
    with pytest.raises(ValueError, match="`pages`: expected pages that are contiguous"):
        copy_pages(torch.zeros(4, 4, 6)[..., ::2], pairs)
    with pytest.raises(ValueError, match=r"`pairs`: expected \[N 2\]"):
        copy_pages(torch.zeros(4, 4), pairs[:, :1])
    with pytest.raises(TypeError, match="`pairs`: expected dtype"):
        copy_pages(torch.zeros(4, 4), pairs.float())
