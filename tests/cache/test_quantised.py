"""A memory of codes: what stays as it is, what codes stand for, all that a cache has to do."""

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.cache import Call, Quantised, parse_memory
from bitnet_triton.errors import CheckpointError
from bitnet_triton.kernels import Mask
from bitnet_triton.kernels.flash_attention.reference import attention_reference
from bitnet_triton.kernels.hadamard.forward import rotation
from bitnet_triton.models.saved_cache import load_cache, save_cache

FOUR = {"name": "quantised", "bits": 4, "recent": 64}
EIGHT = {"name": "quantised", "bits": 8, "recent": 64}


@pytest.fixture(scope="module")
def model():
    return bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attention="full", dtype=torch.float32
    ).eval()


def generate(model, ids, new, **settings):
    return model.generate(
        ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **settings,
    )  # fmt: skip


def logits_of(output):
    return torch.stack(output.logits, dim=1)  # [B T V]


def heads(B, T, H=4, D=32):
    return torch.randn(B, H, T, D)


def held_rows(layer, row, count):
    """Return the keys and values that a row of ``count`` tokens holds, by the definition."""
    sinks, recent = layer.sinks, layer.recent
    coded = max(count - sinks - recent, 0)
    k, v = layer.codes.read(row, 0, coded)
    near = [*range(min(sinks, count)), *range(sinks + coded, count)]
    slots = [p if p < sinks else sinks + (p - sinks) % recent for p in near]
    return [torch.cat([c, t[row, :, slots]], dim=1) for c, t in zip((k, v), layer.near)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("chunks", [(300, 1, 70, 1), (1,) * 3 + (64, 5, 200), (68, 64, 64, 1)])
def test_calls_read_the_codes_of_earlier_ones_and_their_own_tokens_as_they_are(bits, chunks):
    """Row 1 has padding in front, which counts for nothing."""
    layer = Quantised(bits=bits, recent=64, sinks=4).memory()
    leftpad = torch.tensor([0, 2], dtype=torch.int32)
    seen = [0, 0]
    with torch.no_grad():
        for T in chunks:
            layer.begin(Call(layer.tokens, leftpad))
            past = [held_rows(layer, row, n) if n else None for row, n in enumerate(seen)]
            k, v, q = heads(2, T), heads(2, T), torch.randn(2, T, 8, 32)
            given = layer.update(k, v)
            padding = layer.held_padding()
            settings = {} if padding is None else {"leftpad_k": padding}
            out, lse = layer.attend(
                q, *(t.transpose(1, 2) for t in given), mask=Mask(), scale=0.2, return_lse=True,
                **settings,
            )  # fmt: skip
            for row in range(2):
                own = max(min(T, layer.tokens - int(leftpad[row])), 0)
                if own == 0:
                    continue
                parts = [t[row, :, T - own :] for t in (k, v)]
                if past[row] is not None:
                    parts = [torch.cat([p, t], 1) for p, t in zip(past[row], parts)]
                exact, exact_lse = attention_reference(
                    q[row : row + 1, T - own :].double(),
                    *(t.transpose(0, 1)[None].double() for t in parts), mask=Mask(), scale=0.2,
                )  # fmt: skip
                assert (out[row, T - own :] - exact[0]).abs().max() < 1e-5
                assert (lse[row, :, T - own :] - exact_lse[0]).abs().max() < 1e-5
                seen[row] += own
    assert seen == [layer.tokens, layer.tokens - 2]


def test_short_texts_are_those_of_the_plain_cache_bit_for_bit(model):
    ids = torch.randint(10, 1000, (2, 68))
    with torch.no_grad():
        plain = model(ids)
        cache = bt.models.bitnet.planned.named_cache(model.model, FOUR)
        ours = model(ids, past_key_values=cache)
    assert torch.equal(plain.logits, ours.logits)
    more = torch.randint(10, 1000, (2, 30))
    with torch.no_grad():
        # nothing had left the window when the call began
        a = model(more, past_key_values=plain.past_key_values).logits
        b = model(more, past_key_values=ours.past_key_values).logits
    assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [4, 8])
def test_steps_read_codes_and_what_is_near(bits):
    """Row 1 has padding in front; places come as a recorded step gets them."""
    layer = Quantised(bits=bits, recent=64, sinks=4).memory()
    leftpad = torch.tensor([0, 20], dtype=torch.int32)
    cos, sin = torch.ones(1, 32), torch.zeros(1, 32)
    with torch.no_grad():
        layer.begin(Call(0, leftpad))
        layer.update(heads(2, 50), heads(2, 50))
        for step in range(120):
            call = Call(layer.tokens, leftpad, 0)
            layer.begin(call)
            layer.reserve(1)
            places, new = layer.places(call), torch.randn(2, 1, 8 + 2 * 4, 32)
            q = layer.write(new, cos, sin, places)
            assert torch.equal(q, new[:, :, :8])
            out, _ = layer.decode(q, places, mask=Mask(), scale=0.2)
            layer.advance(1)
            if step % 17 and step != 119:
                continue
            for row, count in enumerate((layer.tokens, layer.tokens - 20)):
                k, v = (t.transpose(0, 1)[None].double() for t in held_rows(layer, row, count))
                assert torch.equal(k[0, -1].float(), new[row, 0, 8:12])
                exact, _ = attention_reference(
                    q[row : row + 1].double(), k, v, mask=Mask(), scale=0.2
                )
                assert (out[row] - exact[0]).abs().max() < 1e-5


def test_decode_steps_are_recorded_over_new_groups_and_larger_stores(model):
    ids = torch.randint(10, 1000, (1, 250))
    output = generate(model, ids, 80, cache_implementation=FOUR)
    assert model.model.decode_steps.recording is not None
    layer = output.past_key_values.layers[0]
    assert layer.codes.capacity > 256  # more than it began with
    # the same text in one call: its window is not coded, all else is as in the steps
    cache = bt.models.bitnet.planned.named_cache(model.model, FOUR)
    with torch.no_grad():
        model(output.sequences[:, :-1], past_key_values=cache)
    for t, exact in zip(held_rows(layer, 0, 329), held_rows(cache.layers[0], 0, 329)):
        assert (t - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_steps_behind_a_short_prompt_are_recorded_in_a_fresh_process(bits, model):
    rotation.cache_clear()
    ids = torch.randint(10, 1000, (1, 20))
    told = {**FOUR, "bits": bits}
    output = generate(model, ids, 8, cache_implementation=told)
    assert model.model.decode_steps.recording is not None
    assert output.past_key_values.layers[0].get_seq_length() == 27


def test_padding_changes_no_row(model):
    ids = torch.randint(10, 1000, (1, 150))
    alone = generate(model, ids, 70, cache_implementation=FOUR)
    padded = torch.cat([torch.zeros(1, 41, dtype=torch.long), ids], dim=1)
    both = torch.cat([padded, torch.randint(10, 1000, padded.shape)])
    mask = torch.ones_like(both)
    mask[0, :41] = 0
    batch = generate(model, both, 70, attention_mask=mask, cache_implementation=FOUR)
    assert torch.equal(batch.sequences[0, 41:], alone.sequences[0])
    a, b = logits_of(batch)[0], logits_of(alone)[0]
    assert (a - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize(("cache", "limit"), [(EIGHT, 0.15), (FOUR, 0.3)])
def test_codes_cost_little_and_bytes_fall(cache, limit, model):
    ids = torch.randint(10, 1000, (1, 700))
    plain = generate(model, ids, 8)
    ours = generate(model, ids, 8, cache_implementation=cache)
    # as far as both have read the same tokens
    is_same = ours.sequences[0, 700:] == plain.sequences[0, 700:]
    steps = slice(0, int(is_same.int().cumprod(0).sum()) + 1)
    a, b = (logits_of(out)[:, steps] for out in (ours, plain))
    assert 0 < (a - b).norm() < limit * b.norm()
    layer = ours.past_key_values.layers[0]
    D, Hk, T = 64, 4, layer.codes.capacity
    near = 2 * Hk * (64 + 4) * D * 4
    codes = 2 * Hk * T * (D if cache["bits"] == 8 else D // 2) + Hk * T * 4
    codes += Hk * T * 4 if cache["bits"] == 8 else Hk * T // 64 * D * 4
    held = {t.data_ptr(): t.numel() * t.element_size() for t in layer.tensors()}
    assert near + codes <= sum(held.values()) <= near + codes + 64
    assert T <= (707 - 68) * 1.25 + 5 * 64


def test_beams_and_rows_go_together(model):
    ids = torch.randint(10, 1000, (2, 140))
    batch = generate(model, ids, 12, num_beams=3, cache_implementation=EIGHT).sequences
    rows = [
        generate(model, row[None], 12, num_beams=3, cache_implementation=EIGHT).sequences[0]
        for row in ids
    ]
    assert torch.equal(batch, torch.stack(rows))


@pytest.mark.parametrize("taken", [1, 64, 150, 290])
def test_a_text_that_was_cropped_goes_on_from_its_codes(taken):
    layer, like = (Quantised(bits=8, recent=64, sinks=4).memory() for _ in range(2))
    k, v = heads(2, 300), heads(2, 300)
    with torch.no_grad():
        layer.update(k, v)
        before = [layer.codes.read(row, 0, 232) for row in range(2)]
        assert not layer.can_take_back(taken)
        layer.crop(-taken)
        like.update(k[:, :, : 300 - taken], v[:, :, : 300 - taken])
        count = 300 - taken
        assert layer.get_seq_length() == count
        for row in range(2):
            for t, exact in zip(held_rows(layer, row, count), held_rows(like, row, count)):
                assert (t - exact).norm() < 0.01 * exact.norm()
            # what stands in the window again is what its code stood for
            first, end = max(count - 64, 4), min(236, count)
            if end > first:
                slots = [4 + (p - 4) % 64 for p in range(first, end)]
                for store, t in zip(layer.near, before[row]):
                    assert torch.equal(store[row, :, slots], t[:, first - 4 : end - 4])
        k, v = heads(2, 200), heads(2, 200)
        layer.update(k, v)
        like.update(k, v)
        for t, exact in zip(held_rows(layer, 1, count + 200), held_rows(like, 1, count + 200)):
            assert (t - exact).norm() < 0.01 * exact.norm()


def test_a_saved_cache_goes_on_where_it_was(tmp_path):
    model = bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attention="full", cache=FOUR, dtype=torch.float32
    ).eval()
    ids = torch.randint(10, 1000, (1, 230))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        save_cache(model, cache, tmp_path / "cache.safetensors")
        again = load_cache(model, tmp_path / "cache.safetensors")
        step = torch.tensor([[5]])
        a = model(step, past_key_values=cache).logits
        b = model(step, past_key_values=again).logits
    assert torch.equal(a, b)
    bt.set_cache(model, EIGHT)
    with pytest.raises(CheckpointError, match="expected codes with bits"):
        load_cache(model, tmp_path / "cache.safetensors")


def test_codes_that_lie_token_by_token_are_refused():
    layer, again = (Quantised(bits=4, recent=64, sinks=4).memory() for _ in range(2))
    with torch.no_grad():
        layer.update(heads(1, 200), heads(1, 200))
        saved = layer.saved()
        saved["codes.values"] = torch.zeros(1, 4, layer.codes.capacity, 16, dtype=torch.uint8)
        with pytest.raises(CheckpointError, match="values lie in another way"):
            again.restore(saved)


def test_a_second_turn_reads_the_codes_of_the_first(model):
    ids = torch.randint(10, 1000, (1, 200))
    first = generate(model, ids, 5, cache_implementation=EIGHT)
    longer = torch.cat([first.sequences, torch.randint(10, 1000, (1, 90))], dim=1)
    cache = first.past_key_values
    second = generate(model, longer, 5, past_key_values=cache)
    plain = generate(model, longer, 5)
    a, b = logits_of(second), logits_of(plain)
    assert 0 < (a - b).norm() < 0.1 * b.norm()


def test_what_does_not_fit_is_refused(model):
    for cache, message in (
        ({"bits": 3}, "'bits': expected 4 or 8, got 3"),
        ({"recent": 100}, "'recent': expected a multiple of 64, got 100"),
        ({"recent": 0}, "'recent': expected at least 64, got 0"),
        ({"sinks": -1}, "'sinks': expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_memory({"name": "quantised", **cache})
    with pytest.raises(TypeError, match="'rotate': expected true or false, got int"):
        parse_memory({"name": "quantised", "rotate": 1})
    with pytest.raises(ValueError, match="'quantised' does not go with attention 'quest'"):
        bt.BitNetConfig(attention="quest", cache="quantised")
    cache = bt.models.bitnet.planned.named_cache(model.model, FOUR)
    ids, mask = torch.randint(10, 1000, (1, 8)), torch.ones(1, 8, dtype=torch.long)
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="takes padding to the left"), torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    layer = Quantised().memory()
    with torch.no_grad():
        layer.update(heads(1, 3), heads(1, 3))
        with pytest.raises(ValueError, match="`tokens_to_remove`: expected at most 0, got 1"):
            layer.crop(1)
