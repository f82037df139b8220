"""Prompts that begin with what was read before: tokens of plain generate, work and memory saved."""

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model

import bitnet_triton as bt

PAGE = 16


@pytest.fixture(scope="module")
def model():
    return bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attention="full", dtype=torch.float32
    ).eval()


@pytest.fixture
def prefixes(model):
    return bt.PrefixCache(model, tokens=8192, page_size=PAGE)


@pytest.fixture
def computed(model, monkeypatch):
    """Count the tokens that go through the decoder, padding included."""
    found, kind = [0], type(model.model)
    forward = kind.forward

    def counting(self, input_ids=None, **kwargs):
        found[0] += input_ids.numel()
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(kind, "forward", counting)
    return found


def draw(*shape):
    return torch.randint(10, 1000, shape)


def generate(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
        pad_token_id=0, **settings,
    )  # fmt: skip


def test_a_second_turn_reads_the_first_from_the_tree(model, prefixes, computed):
    ids = draw(1, 200)
    cache = prefixes.cache(ids)
    assert cache.get_seq_length() == 0
    answer = generate(model, ids, past_key_values=cache)
    prefixes.keep(cache, answer)
    del cache
    gc.collect()
    assert prefixes.pool.used == len(prefixes.tree) == 211 // PAGE
    more = torch.cat([answer, draw(1, 30)], 1)
    computed[0] = 0
    cache = prefixes.cache(more)
    assert cache.get_seq_length() == 208
    second = generate(model, more, past_key_values=cache)
    assert computed[0] == 242 - 208 + 11
    assert torch.equal(second, generate(model, more))


def test_prompts_share_what_they_have_in_common(model, prefixes, computed):
    """As 64 prompts behind 2048 tokens in docs/caches.md, smaller."""
    common, tails = draw(1, 512), draw(8, 24)
    ids = torch.cat([common.expand(8, -1), tails], 1)
    cache = prefixes.cache(ids)
    ours = generate(model, ids, past_key_values=cache)
    assert computed[0] <= 1.1 * (512 + 8 * (24 + 11))
    assert prefixes.pool.used * PAGE <= 1.1 * (512 + 8 * (24 + 12 + PAGE))
    for row, prompt in enumerate(ids):
        assert torch.equal(ours[row : row + 1], generate(model, prompt[None]))


def test_rows_with_padding_begin_where_all_of_them_can(model, prefixes):
    common = draw(100)
    ids, mask = draw(3, 130), torch.ones(3, 130, dtype=torch.long)
    for row, left in enumerate((0, 17, 60)):
        mask[row, :left] = 0
        ids[row, left : left + 70] = common[:70]
    cache = prefixes.cache(ids, mask)
    assert cache.get_seq_length() == 64  # whole pages of what the longest row has
    ours = generate(model, ids, mask, past_key_values=cache)
    assert torch.equal(ours, generate(model, ids, mask))
    prefixes.keep(cache, ours)
    again = prefixes.cache(ids, mask)
    assert again.get_seq_length() == 60 + 64  # of the shortest row
    assert torch.equal(generate(model, ids, mask, past_key_values=again), ours)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True}], ids=str)
def test_beams_and_samples_read_a_prompt_once(settings, model, prefixes, computed):
    ids, mask = draw(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[1, :40] = 0
    each = {"num_return_sequences": 3} | settings
    repeated = [t.repeat_interleave(3, 0) for t in (ids, mask)]
    computed[0] = 0
    cache = prefixes.cache(*repeated)
    assert cache.get_seq_length() == 149
    assert computed[0] <= 2 * 149
    assert prefixes.pool.used <= 10 + 7
    written = []
    for given in (cache, None):
        torch.manual_seed(5)
        written.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=12,
                eos_token_id=None,
                pad_token_id=0,
                past_key_values=given,
                **{"do_sample": False} | each,
            )
        )
    assert torch.equal(*written)
    prefixes.keep(cache, repeated[0])  # what beams have in common
    assert prefixes.cache(ids, mask).get_seq_length() == 40 + 96


def test_namespaces_and_adapters_never_meet(prefixes, model):
    ids = draw(1, 80)
    prefixes.keep(_read(model, prefixes.cache(ids, namespace="a"), ids), ids)
    assert prefixes.cache(ids, namespace="a").get_seq_length() == 79 // PAGE * PAGE
    assert prefixes.cache(ids, namespace="b").get_seq_length() == 0
    assert prefixes.cache(ids).get_seq_length() == 0


def _read(model, cache, ids):
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def test_adapters_are_told_from_one_another():
    plain = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, attention="full")
    tuned = get_peft_model(
        plain, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    ).eval()
    prefixes = bt.PrefixCache(tuned, tokens=1024, page_size=PAGE)
    ids = torch.randint(2, 200, (1, 40))
    cache = prefixes.cache(ids)
    prefixes.keep(_read(tuned, cache, ids), ids)
    assert prefixes.cache(ids).get_seq_length() == 32
    with tuned.disable_adapter():
        assert prefixes.cache(ids).get_seq_length() == 0
        with pytest.raises(ValueError, match="`cache`: it was made with another attention"):
            prefixes.keep(cache, ids)
    tuned.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=2))
    tuned.set_adapter("other")
    assert prefixes.cache(ids).get_seq_length() == 0


def clear_texts(model, length):
    """Draw texts [2 50] whose next tokens are far better than any other.

    A prompt in two parts is summed in another order, and codes of activations turn by that: 0.014
    was seen to part two scores.
    """
    while True:
        ids = torch.randint(2, 200, (2, 50))
        scores = generate(
            model, ids, context_length=length, output_scores=True, return_dict_in_generate=True
        ).scores
        best, second = torch.stack(scores).topk(2).values.unbind(-1)
        if (best - second).min() > 0.05:
            return ids


def test_frequencies_by_length_are_those_that_were_told():
    """The embedded text model has longrope: short texts are turned otherwise than long ones."""
    model = bt.BitNetForCausalLM.from_pretrained(
        bt.TINY_MODEL, attention="full", dtype=torch.float32
    ).eval()
    for length in (None, 200):
        ids = clear_texts(model, length or model.config.max_position_embeddings)
        prefixes = bt.PrefixCache(model, tokens=2048, page_size=PAGE, context_length=length)
        told = length or model.config.max_position_embeddings
        plain = generate(model, ids, context_length=told)
        for held in (0, 48):
            cache = prefixes.cache(ids)
            assert cache.get_seq_length() == held
            ours = generate(model, ids, past_key_values=cache)
            assert torch.equal(ours, plain)
            prefixes.keep(cache, ours)
    with pytest.raises(ValueError, match="rotated for texts of up to 1024 columns, this call"):
        model(torch.randint(2, 200, (2, 1100)), past_key_values=prefixes.cache(ids))


def test_pinned_texts_stay_and_others_go(model):
    prefixes = bt.PrefixCache(model, tokens=16 * PAGE, page_size=PAGE)
    system = draw(5 * PAGE + 3)
    prefixes.pin(system)
    assert len(prefixes.tree) == 5
    for _ in range(4):
        ids = draw(1, 6 * PAGE)
        cache = prefixes.cache(ids)
        prefixes.keep(_read(model, cache, ids), ids)
        del cache
        gc.collect()
    assert len(prefixes.tree) <= 16
    assert prefixes.cache(torch.cat([system, draw(9)])[None]).get_seq_length() == 5 * PAGE
    with pytest.raises(bt.OutOfPagesError, match="17 wanted"):
        _read(model, prefixes.cache(draw(1, 17 * PAGE)), draw(1, 17 * PAGE))
    prefixes.unpin(system)
    prefixes.clear()
    gc.collect()
    assert prefixes.pool.used == 0


def test_what_does_not_fit_is_refused(model, prefixes):
    windows = [{"mode": "sliding", "window": 16}, "full", "full"]
    other = bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attention={"prefill": windows, "decode": windows}
    )
    with pytest.raises(ValueError, match="layer 0 with attention 'sliding' keeps a window"):
        bt.PrefixCache(other)
    with pytest.raises(ValueError, match="'pages' does not go with attention 'quest'"):
        bt.PrefixCache(bt.set_attention(other, "quest"))
    with pytest.raises(ValueError, match=r"expected BitNetForCausalLM with `config.attention`"):
        bt.PrefixCache(bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL))
    with pytest.raises(ValueError, match="`context_length`: expected none, rope type 'default'"):
        bt.PrefixCache(model, context_length=100)
    ids = draw(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    with pytest.raises(ValueError, match="padding to the left only"):
        prefixes.cache(ids, mask)
    ids[1, :20] = ids[0, :20]
    cache = prefixes.cache(ids)
    assert cache.get_seq_length() == PAGE
    with pytest.raises(ValueError, match="the cache has 2 rows, got 1"):
        prefixes.keep(cache, ids[:1])
    with pytest.raises(ValueError, match="the cache begins with other tokens"):
        prefixes.keep(cache, draw(2, 40))
    with pytest.raises(ValueError, match="its pages are those of another pool"):
        bt.PrefixCache(model, tokens=1024).keep(cache, ids)
    with pytest.raises(ValueError, match=r"expected one of `PrefixCache.cache`"):
        prefixes.keep(model(ids, use_cache=True).past_key_values, ids)


def continuation(model, cache, ids):
    """Return logits of what a cache does not hold of ``ids``, and those without a cache."""
    held = cache.get_seq_length()
    with torch.no_grad():
        cached = model(ids[:, held:], past_key_values=cache).logits
        return cached, model(ids, use_cache=False).logits[:, held:], held


def test_rows_of_a_beam_search_leave_their_prompt_alone(model, prefixes):
    ids = draw(1, 100)
    cache = prefixes.cache(ids.repeat_interleave(4, 0))
    answers = generate(
        model, ids, past_key_values=cache, num_beams=4, num_return_sequences=4, length_penalty=2.0
    )
    prefixes.keep(cache, answers)
    assert len(prefixes.tree) == 99 // PAGE
    for answer in answers[:, None]:
        text = torch.cat([answer, draw(1, 40)], 1)
        cached, expected, held = continuation(model, prefixes.cache(text), text)
        assert held == 96
        torch.testing.assert_close(cached, expected, rtol=0, atol=0.1)


def test_rows_in_another_order_are_known_by_what_was_read(model, prefixes):
    prefixes.pin(draw(64))
    ids = draw(3, 60)
    prompts = prefixes.cache(ids)
    generate(model, ids, past_key_values=prompts)
    prefixes.keep(prompts, ids)
    cache = prefixes.cache(ids)
    held = cache.get_seq_length()
    assert held == 48
    order = torch.tensor([2, 0, 1])
    cache.batch_select_indices(order)
    with pytest.raises(ValueError, match="`input_ids`: the cache begins with other tokens"):
        prefixes.keep(cache, ids)
    pages = len(prefixes.tree)
    prefixes.keep(cache, ids[order])
    assert len(prefixes.tree) == pages


def test_another_attention_is_noticed(model):
    changed = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, attention="full")
    prefixes = bt.PrefixCache(changed, tokens=4096, page_size=PAGE)
    ids = draw(1, 64)
    cache = prefixes.cache(ids)
    bt.set_attention(changed, {"mode": "sliding", "window": 16})
    for ask in (lambda: prefixes.cache(ids), lambda: prefixes.keep(cache, ids)):
        with pytest.raises(ValueError, match="all of them keep windows"):
            ask()


def test_another_length_is_noticed():
    longer = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, attention="full")
    prefixes = bt.PrefixCache(longer, tokens=4096, page_size=PAGE)
    ids = draw(1, 64)
    prefixes.pin(ids[0])
    bt.extend_context(longer, 4, "dynamic_yarn")
    cache = prefixes.cache(ids)
    assert cache.get_seq_length() == 0
    assert prefixes._length == longer.config.max_position_embeddings


def test_another_adapter_of_the_same_name_is_noticed():
    base = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, attention="full")
    tuned = get_peft_model(base, LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    prefixes = bt.PrefixCache(tuned, tokens=4096, page_size=PAGE)
    ids = draw(1, 64)
    prefixes.pin(ids[0])
    assert prefixes.cache(ids).get_seq_length() == 48
    tuned.delete_adapter("default")
    tuned.add_adapter("default", LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    tuned.set_adapter("default")
    assert prefixes.cache(ids).get_seq_length() == 0


def test_bad_arguments_are_named(model, prefixes):
    with pytest.raises(ValueError, match=r"`input_ids`: expected a tensor \[B T\], got \[5\]"):
        prefixes.cache(draw(5))
    with pytest.raises(ValueError, match=r"`input_ids`: expected a tensor \[T\], got list"):
        prefixes.pin([1, 2])
    with pytest.raises(ValueError, match="`input_ids`: expected a text that is pinned"):
        prefixes.unpin(draw(40))
    tiny = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, attention="full")
    with pytest.raises(ValueError, match="`context_length`: expected tokens, got 0"):
        bt.PrefixCache(tiny, context_length=0)
