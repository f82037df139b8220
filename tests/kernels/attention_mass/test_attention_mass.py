"""What each key receives, against the columns of the matrix in float64."""

import pytest
import torch

from bitnet_triton.kernels import Mask, attention_mass, flash_attention
from bitnet_triton.kernels.attention_mass.reference import attention_mass_reference
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.testing import assert_close

pytestmark = [
    pytest.mark.backends("triton", "reference"),
    pytest.mark.usefixtures("forced_backend"),
]

MASKS = {
    "causal": Mask(),
    "everything": Mask(causal=False),
    "both sides": Mask(causal=False, window=20, window_right=9),
    "window and sinks": Mask(window=40, sinks=3),
    "dilation by head": Mask(window=9, dilation=(1, 3, 2, 4), sinks=2),
    "global tokens": Mask(window=9, global_tokens=(0, 77, 140)),
    "dense rows": Mask(window=9, sinks=3, dense_from=100),
    "fixed": Mask(pattern="fixed", block=37, summary=3),
    "strided": Mask(pattern="strided", block=37),
}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def exact_mass(q, k, lse, **settings):
    """Return the columns of softmax, by taking the average of one-hot values; lse is not used."""
    B, Tk = k.shape[:2]
    v = torch.eye(Tk, dtype=torch.float64, device=k.device)[None, :, None]
    v = v.expand(B, Tk, k.shape[2], Tk)
    out, _ = attention_reference(q.double(), k.double(), v, **settings)
    return out.sum(1)


def compare(mask, device, dtype=torch.float32, Tq=150, Tk=150, H=4, Hk=2, D=32, **settings):
    q = torch.randn(2, Tq, H, D, device=device).to(dtype)
    k = torch.randn(2, Tk, Hk, D, device=device).to(dtype)
    settings = {"mask": mask, "scale": D**-0.5} | settings
    _, lse = attention_reference(q.double(), k.double(), k.double(), **settings)
    exact = exact_mass(q, k, lse, **settings)
    # weights are computed in float32, whatever the inputs are
    eager = attention_mass_reference(q.float(), k.float(), lse.float(), **settings)
    ours = attention_mass(q, k, lse.float(), **settings)
    assert_close("mass", ours, exact, eager=eager)


@pytest.mark.parametrize("name", MASKS)
def test_keys_receive_the_columns_of_the_probabilities(name, device, backend):
    compare(MASKS[name], device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_summed_in_float32(dtype, device, backend):
    compare(Mask(), device, dtype=dtype)


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 150), (7, 150), (1, 1), (150, 31)])
def test_queries_stand_at_the_last_keys(Tq, Tk, device, backend):
    compare(Mask(), device, Tq=Tq, Tk=Tk)


def test_bounded_scores_weigh_as_in_attention(device, backend):
    compare(Mask(), device, softcap=1.5)


def test_padding_receives_and_gives_nothing(device, backend):
    lengths = {"leftpad_k": int32(0, 120), "seqused_k": int32(110, 150)}
    compare(Mask(sinks=2, window=40), device, **{name: t.to(device) for name, t in lengths.items()})


def test_packed_sequences_are_those_alone(device, backend):
    q, k = (torch.randn(200, heads, 32, device=device) for heads in (4, 2))
    ends = int32(0, 61, 61, 200).to(device)
    packed = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "mask": Mask(window=50, sinks=3)}
    _, lse = flash_attention(q, k, k, **packed, return_lse=True)
    ours = attention_mass(q, k, lse, **packed)
    for part in (slice(0, 61), slice(61, 200)):
        settings = {"mask": packed["mask"], "scale": 32**-0.5}
        alone = (q[None, part], k[None, part], lse[None, :, part])
        eager = attention_mass_reference(*alone, **settings)
        assert_close("mass", ours[None, :, part], exact_mass(*alone, **settings), eager=eager)


def test_two_halves_of_the_keys_share_one_whole(device, backend):
    q, k = (torch.randn(1, 40, heads, 32, device=device) for heads in (4, 2))
    everything = {"mask": Mask(causal=False)}
    _, lse = flash_attention(q, k, k, **everything, return_lse=True)
    halves = [attention_mass(q, half, lse, **everything) for half in k.chunk(2, dim=1)]
    assert (torch.cat(halves, -1).sum(-1) - 40).abs().max() < 1e-4


def test_it_traces_and_repeats_bitwise(device, backend):
    q, k = (torch.randn(2, 150, heads, 32, device=device) for heads in (4, 2))
    _, lse = flash_attention(q, k, k, return_lse=True)
    ours = attention_mass(q.requires_grad_(), k, lse)
    assert not ours.requires_grad
    compiled = torch.compile(attention_mass, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, lse), ours)
    strided = q.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attention_mass(strided, k, lse), ours)


def test_no_query_gives_nothing(device, backend):
    q, k = torch.randn(1, 0, 4, 32, device=device), torch.randn(1, 9, 2, 32, device=device)
    mass = attention_mass(q, k, torch.zeros(1, 4, 0, device=device))
    assert torch.equal(mass, torch.zeros(1, 4, 9, device=device))


def test_a_wrong_lse_is_named(device, backend):
    q, k = (torch.randn(1, 9, heads, 32, device=device) for heads in (4, 2))
    with pytest.raises(ValueError, match=r"`lse`: expected \[B H Tq\] with .*got \[1, 9, 4\]"):
        attention_mass(q, k, torch.zeros(1, 9, 4, device=device))
    with pytest.raises(TypeError, match="`lse`"):
        attention_mass(q, k, torch.zeros(1, 4, 9, dtype=torch.float64, device=device))
