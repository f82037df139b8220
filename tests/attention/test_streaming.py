"""StreamingLLM: the kept tokens at the positions that they have inside the cache."""

import pytest
import torch

from bitnet_triton.attention import AttentionContext
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.modes.streaming import Streaming, rotate
from bitnet_triton.attention.tokens import Tokens
from bitnet_triton.cache import StreamingLayer

T, WINDOW, SINKS = 17, 5, 2
FREQUENCIES = 1 / 100.0 ** (torch.arange(0, 16, 2) / 16)


def rotated(x, positions):
    """Rotate x [B T H D] in float64, written out pair by pair."""
    x, out = x.double(), torch.empty_like(x, dtype=torch.float64)
    for i, frequency in enumerate(FREQUENCIES.double()):
        angle = (positions.double() * frequency)[..., None]
        a, b = x[..., i], x[..., i + 8]
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + 8] = b * angle.cos() + a * angle.sin()
    return out


def context(positions, **tokens):
    return AttentionContext(0, 0.25, Tokens(**tokens), positions=positions, frequencies=FREQUENCIES)


def rerun(q, k, v, formula, row, left=0):
    """Attend for each query to the kept tokens at positions 0 to c - 1: the definition."""
    out = torch.zeros(q.shape[1:], dtype=torch.float64)
    for t in range(q.shape[1] - left):
        kept = [j for j in range(t + 1) if j < SINKS or t - j < WINDOW]
        c = len(kept)
        columns = [left + j for j in kept]
        keys = rotated(k[row : row + 1, columns], torch.arange(c)[None])
        query = rotated(q[row : row + 1, left + t : left + t + 1], torch.tensor([[c - 1]]))
        seen = torch.ones(1, c, dtype=torch.bool)
        out[left + t] = formula(query, keys, v[row : row + 1, columns], seen, 0.25)[0, 0]
    return out


def test_it_is_attention_to_the_kept_tokens_at_their_places_in_the_cache(heads, formula):
    q, k, v = heads(T)
    left = torch.tensor([0, 4]).int()
    position = (torch.arange(T) - left[:, None]).clamp_min(0)
    y = Streaming(WINDOW, SINKS)(
        rotated(q, position).float(), rotated(k, position).float(), v,
        context(position, leftpad=left),
    )  # fmt: skip
    for row in range(2):
        expected = rerun(q, k, v, formula, row, int(left[row]))
        torch.testing.assert_close(y[row].double(), expected, rtol=1e-4, atol=1e-5)


def stream(layer, q, k, v, chunks, rebase_at=()):
    """Run chunk by chunk with a cache, whose positions start again where asked to."""
    outs, start, lefts = [], 0, layer.leftpad
    for size in chunks:
        if start in rebase_at:
            layer.rebase(WINDOW + SINKS + 1, FREQUENCIES)
        columns = slice(start, start + size)
        position = torch.arange(start, start + size)[None]
        position = position if lefts is None else position - lefts[:, None]
        if layer.shift is not None:
            position = position - layer.shift[:, None]
        position = position.clamp_min(0)
        keys = rotated(k[:, columns], position).float().transpose(1, 2)
        held = layer.update(keys, v[:, columns].transpose(1, 2))
        outs.append(
            Streaming(WINDOW, SINKS)(
                rotated(q[:, columns], position).float(),
                *(t.transpose(1, 2) for t in held),
                context(position, offset=start, leftpad=lefts),
            )
        )
        start += size
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("chunks", [[T], [1] * T, [9, 1, 1, 4, 2], [2, 12, 3]], ids=str)
@pytest.mark.parametrize("rebase_at", [(), (10, 14, 15)], ids=str)
def test_neither_chunks_nor_new_positions_change_anything(chunks, rebase_at, heads, formula):
    q, k, v = heads(T)
    layer = StreamingLayer(WINDOW - 1, SINKS)
    layer.slack = 2
    layer.leftpad = torch.tensor([0, 4]).int()
    y = stream(layer, q, k, v, chunks, rebase_at)
    for row, left in enumerate((0, 4)):
        expected = rerun(q, k, v, formula, row, left)
        torch.testing.assert_close(y[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_evicted_tokens_change_nothing(heads):
    q, k, v = heads(T)
    position = torch.arange(T)[None]
    expected = Streaming(WINDOW, SINKS)(q, k, v, context(position))
    for t in (k, v):
        t[:, SINKS : T - WINDOW] = torch.randn_like(t[:, SINKS : T - WINDOW])
    y = Streaming(WINDOW, SINKS)(q, k, v, context(position))
    assert torch.equal(y[:, -1], expected[:, -1])
    k[:, 0] += 1
    assert not torch.equal(Streaming(WINDOW, SINKS)(q, k, v, context(position))[:, -1], y[:, -1])


def test_a_window_as_long_as_the_text_is_full_attention(heads):
    q, k, v = heads(T)
    y = Streaming(T, 3)(q, k, v, context(torch.arange(T)[None]))
    torch.testing.assert_close(y, Full()(q, k, v, AttentionContext(0, 0.25)))


def test_gradients_are_those_of_the_formula(heads):
    q, k, v = (t.requires_grad_() for t in heads(T))
    position = torch.arange(T)[None]
    Streaming(WINDOW, SINKS)(q, k, v, context(position)).square().sum().backward()
    ours = [t.grad for t in (q, k, v)]
    step = 1e-2
    for t, grad in zip((q, k, v), ours):
        direction = torch.randn_like(t)
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                moved = [u + sign * step * direction if u is t else u for u in (q, k, v)]
                y = Streaming(WINDOW, SINKS)(*moved, context(position))
                losses.append(y.double().square().sum())
        slope = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close((grad * direction).double().sum(), slope, rtol=1e-2, atol=1e-2)


def test_rotation_forth_and_back_is_none():
    x = torch.randn(2, 5, 3, 16)
    steps = torch.tensor([[0, 1, 50, 4097, 2**21 - 1], [3, 2, 7, 70000, 1_500_001]])
    torch.testing.assert_close(rotate(rotate(x, steps, FREQUENCIES), -steps, FREQUENCIES), x)
    turned = rotate(x, steps, FREQUENCIES).double()
    torch.testing.assert_close(turned, rotated(x, steps), rtol=1e-4, atol=1e-5)


def test_a_model_that_tells_no_positions_is_refused(heads):
    with pytest.raises(ValueError, match="it needs a model that tells the positions"):
        Streaming(WINDOW, SINKS)(*heads(3), AttentionContext(0, 0.25))


def test_packed_sequences_are_refused(heads):
    packed = context(torch.arange(3)[None], cu_seqlens=torch.tensor([0, 1, 6]).int())
    with pytest.raises(ValueError, match="'streaming' takes no packed sequences"):
        Streaming(WINDOW, SINKS)(*heads(3), packed)
