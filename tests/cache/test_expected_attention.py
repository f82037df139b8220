"""A prompt compressed by the queries to come: against queries that are drawn, and its refusals."""

import pytest
import torch

from bitnet_triton.cache import Attended, Call, parse_memory

FREQUENCIES = 1 / 1000.0 ** (torch.arange(0, 16, 2) / 16)


def attended(T, rotary=True):
    q, k = torch.randn(1, T, 2, 16), torch.randn(1, T, 1, 16)
    angle = torch.arange(T)[None, :, None] * FREQUENCIES.repeat(2)
    return Attended(
        q, k, torch.zeros(1, 2, T), 0.25, rotary=(angle.cos(), angle.sin()) if rotary else None
    )


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_the_statistics_are_those_of_turned_back_queries(factor):
    memory = parse_memory({"name": "expected_attention", "future": 1}).memory()
    memory.begin(Call(0, frequencies=FREQUENCIES))
    call = attended(200)
    memory.columns = 200
    mean, covariance = memory._queries_to_come(call)
    # one position ahead: the statistics of all queries, each turned on to where the next one stands
    angle = (200 - torch.arange(200))[None, :, None, None] * FREQUENCIES
    first, second = call.q.chunk(2, -1)
    moved = torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
    )[0, 4:]
    torch.testing.assert_close(mean[0], moved.mean(0), rtol=1e-3, atol=1e-4)
    for h in range(2):
        expected = torch.cov(moved[:, h].T, correction=0)
        torch.testing.assert_close(covariance[0, h], expected, rtol=1e-3, atol=1e-3)
    # a rotary embedding that also scales turns back just as well, and on again
    cos, sin = call.rotary
    scaled = Attended(call.q * factor, call.k, call.lse, 0.25, rotary=(cos * factor, sin * factor))
    torch.testing.assert_close(
        memory._queries_to_come(scaled)[1], covariance * factor**2, rtol=1e-3, atol=1e-4
    )


def test_without_positions_it_refuses():
    memory = parse_memory({"name": "expected_attention", "budget": 3, "least": 5}).memory()
    memory.begin(Call(0, frequencies=FREQUENCIES))
    call = attended(20, rotary=False)
    keys = call.k.transpose(1, 2)
    memory.update(keys, keys)
    with pytest.raises(ValueError, match="a model that tells the positions"):
        memory.after(call)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="'least': expected at least 5, got 4"):
        parse_memory({"name": "expected_attention", "least": 4})
    with pytest.raises(TypeError, match="'covariance': expected true or false, got int"):
        parse_memory({"name": "expected_attention", "covariance": 1})
