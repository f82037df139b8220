"""The decode step of the plain forms of linear attention, against what a call of one token does."""

from types import SimpleNamespace

import pytest
import torch

from bitnet_triton.attention.linear_parts import PlainParts, constant_log_decay
from bitnet_triton.kernels import apply_rotary, linear_attention
from bitnet_triton.kernels.linear_attention.plain_step import PlainStep, launch_plain_step

B, H, HK, D, P = 3, 4, 2, 24, 40
MAPS = ["elu", "relu", "performer", "hedgehog"]


def draw(feature_map, dtype, device):
    """Return parts that are not where they start, a token for each row, and two states."""
    sizes = SimpleNamespace(
        hidden_size=H * D, num_attention_heads=H, num_key_value_heads=HK, head_dim=D
    )
    parts = PlainParts(sizes, feature_map).to(device, dtype)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    angles = (6 * torch.rand(P, D // 2, device=device)).repeat(1, 2)
    heads = torch.randn(B, 1, H + 2 * HK, D, device=device).to(dtype)
    features = PlainStep(feature_map, *parts.matrices()).features(D)
    states = torch.rand(2, B, HK, features, D + 1, device=device)
    return parts, heads, angles.cos().to(dtype), angles.sin().to(dtype), states


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_it_is_a_call_of_one_token(feature_map, dtype, device):
    """Rows stand at places of their own, and one of them has padding; what is read stays."""
    parts, heads, cos, sin, states = draw(feature_map, dtype, device)
    decay = constant_log_decay(HK, torch.device(device)) if feature_map != "relu" else None
    positions, turn, is_token = (ints(t, device) for t in ([3, 0, P - 1], [1] * B, [1, 0, 1]))
    former = states.clone()
    step = PlainStep(feature_map, *parts.matrices(), decay)
    for _ in range(2):  # done twice, it is as done once
        out = launch_plain_step(
            heads, step, kv_heads=HK, cos=cos, sin=sin, states=states, turn=turn,
            is_token=is_token, positions=positions,
        )  # fmt: skip
    q, k, v = heads.split([H, HK, HK], dim=2)
    at = [angle[positions.long()][:, None] for angle in (cos, sin)]
    with torch.no_grad():
        q, k = parts(apply_rotary(q, *at), apply_rotary(k, *at))
    keeps = is_token[:, None, None]
    expected, state = linear_attention(
        q, k * keeps[..., None].to(dtype), v, normalize=True, scale=1.0, return_state=True,
        log_decay=None if decay is None else decay.expand(B, 1, HK) * keeps,
        initial_state=former[1],
    )  # fmt: skip
    # a feature beside a tie may be rounded to its other side
    limit = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(out, expected, **limit)
    torch.testing.assert_close(states[0], state, **limit)
    assert torch.equal(states[1], former[1])
    assert torch.equal(states[0, 1], former[1, 1])  # of padding


def test_a_row_whose_weights_are_all_zero_gives_zeros(device):
    parts, heads, cos, sin, states = draw("relu", torch.float32, device)
    states.zero_()
    heads[:, :, :H] = 0.0
    out = launch_plain_step(
        heads, PlainStep("relu", *parts.matrices()), kv_heads=HK, cos=cos, sin=sin, states=states,
        turn=ints([0] * B, device), is_token=ints([1] * B, device), positions=ints([5] * B, device),
    )  # fmt: skip
    assert torch.equal(out, torch.zeros_like(out))


def test_queries_of_any_length_stay_finite(device):
    """Performer's features of a query are divided by the largest of them."""
    parts, heads, cos, sin, states = draw("performer", torch.float32, device)
    heads[:, :, :H] *= 100
    out = launch_plain_step(
        heads, PlainStep("performer", *parts.matrices()), kv_heads=HK, cos=cos, sin=sin,
        states=states, turn=ints([0] * B, device), is_token=ints([1] * B, device),
        positions=ints([5] * B, device),
    )  # fmt: skip
    assert out.isfinite().all()
    assert out.abs().sum() > 0
