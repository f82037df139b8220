"""What has received most attention stays: what H2O finds, what it loses, and how it counts."""

import pytest
import torch

from bitnet_triton.cache import parse_memory
from bitnet_triton.kernels import attention_mass, flash_attention
from bitnet_triton.kernels.attention_mass.decode import launch_decode_mass


def test_a_heavy_key_survives_and_one_that_is_needed_late_is_lost(text_of):
    text = text_of("h2o", 20, T=100, lefts=(0,))
    # all queries look at token 3, none at token 30 but those from 80 on
    text.k[:, [3, 30]] = 0.0
    text.k[:, 3, :, 0] = text.k[:, 30, :, 1] = 12.0  # which have nothing in common
    text.q[:, :80] = text.k[:, 3:4].repeat_interleave(2, 2) / 2
    text.q[:, 80:] = text.k[:, 30:31].repeat_interleave(2, 2) / 2
    text.read(80)
    assert all(3 in columns and 30 not in columns for columns in text.kept[0])
    text.read(20)
    assert all(30 not in columns for columns in text.kept[0])


def test_the_share_of_recent_tokens_is_a_setting(text_of):
    for recent in (0.0, 1.0):
        text = text_of("h2o", 20, T=100, lefts=(0,))
        memory = parse_memory({"name": "h2o", "budget": 20, "recent": recent}).memory()
        keys = text.k.transpose(1, 2)
        memory.update(keys, keys)
        memory.mass = torch.rand(1, 2, 100)
        best = memory.mass.topk(20).indices.sort().values
        memory._drop(memory.score(None), torch.tensor([20]))
        expected = [best[0, h].tolist() if recent == 0 else list(range(80, 100)) for h in range(2)]
        for h, columns in enumerate(expected):
            assert torch.equal(memory.keys[0, h], keys[0, h, columns])


@pytest.mark.parametrize(("dtype", "H", "Hk"), [(torch.float32, 4, 2), (torch.bfloat16, 3, 1)])
def test_a_step_gives_what_the_op_says(dtype, H, Hk, device):
    B, capacity, D, used = 2, 1100, 32, torch.tensor([1050, 33], dtype=torch.int32)
    q = torch.randn(B, 1, H, D, dtype=dtype)
    k = torch.randn(B, capacity, Hk, D, dtype=dtype)
    left = torch.tensor([5, 0], dtype=torch.int32)
    q, k, used, left = (t.to(device) for t in (q, k, used, left))
    lengths = {"leftpad_k": left, "seqused_k": used}
    _, lse = flash_attention(q, k, k, return_lse=True, **lengths)
    given = attention_mass(q, k, lse, **lengths).unflatten(1, (Hk, -1)).sum(2)
    former = torch.rand(B, Hk, capacity, device=device)
    mass = former.clone()
    launch_decode_mass(q, k, lse, mass, scale=D**-0.5, **lengths)
    place = torch.arange(capacity, device=device)
    is_held = ((place >= left[:, None]) & (place < used[:, None]))[:, None]
    expected = torch.where(is_held, given, former)  # nothing else is written
    torch.testing.assert_close(mass, expected, rtol=1e-4, atol=1e-6)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="'recent': expected 0 to 1, got 2"):
        parse_memory({"name": "h2o", "recent": 2})
    with pytest.raises(TypeError, match="'recent': expected a number, got str"):
        parse_memory({"name": "h2o", "recent": "half"})
    with pytest.raises(TypeError, match="'average': expected true or false, got str"):
        parse_memory({"name": "h2o", "average": "yes"})
