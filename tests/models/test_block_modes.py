"""Modes that choose blocks: what is dense, what is read, what is learned, and what is refused."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import bitnet_triton as bt
from bitnet_triton.attention import AttentionPlan, blocks
from bitnet_triton.attention.index_loss import index_loss
from bitnet_triton.cache import Call, IndexLayer, UnitsLayer
from bitnet_triton.kernels import Units, pool_keys

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
POOLED = {"mode": "pooled_blocks", "block": 4, "selected": 2, "initial": 0}
INDEXED = {"mode": "indexed_blocks", "block": 4, "selected": 2, "index_keys": "float"}
QUEST = {"mode": "quest", "page": 4, "budget": 8}
BLOCK_MODES = {"pooled_blocks": POOLED, "indexed_blocks": INDEXED, "quest": QUEST}

pytestmark = pytest.mark.usefixtures("default_backend")


@pytest.fixture
def load(checkpoint):
    def load(attention, **kwargs):
        model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), **kwargs)
        return bt.set_attention(model, attention)

    return load


def dense_model(attention, **changes):
    config = bt.BitNetConfig(**SIZES | changes, attention=attention, quantization_config=None)
    model = bt.BitNetForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 1.0 if "embed" in name else 0.15)
    return model


@pytest.mark.parametrize("name", BLOCK_MODES)
def test_a_text_below_the_switch_is_the_dense_model_bit_by_bit(name, load, token_ids):
    ids = token_ids(2, 30)
    full, model = load("full"), load({**BLOCK_MODES[name], "dense_below": 24})
    with torch.inference_mode():
        for end in (24, 17):
            one, two = (m(ids[:, :end], use_cache=False).logits for m in (full, model))
            assert torch.equal(one, two)
        assert not torch.equal(full(ids).logits[:, 24:], model(ids).logits[:, 24:])
        kwargs = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        short = ids[:, :12]
        assert torch.equal(full.generate(short, **kwargs), model.generate(short, **kwargs))


@pytest.mark.parametrize("name", BLOCK_MODES)
def test_what_is_not_chosen_changes_nothing(name, monkeypatch):
    """With the choice held, other keys and values may be anything; one that is chosen may not."""
    model = dense_model(BLOCK_MODES[name], num_hidden_layers=1).eval()
    ids = torch.randint(3, 96, (1, 30))
    chosen = torch.tensor([[1, 7], [3, 7]], dtype=torch.int32)
    held = chosen.expand(1, 30, 2, 2)
    monkeypatch.setattr(blocks, "top_blocks", lambda q, keys, **kwargs: held[:, -q.shape[1] :])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -1]
        ids[:, 16:28] = (ids[:, 16:28] - 2) % 90 + 3  # blocks 4, 5 and 6
        assert torch.equal(model(ids, use_cache=False).logits[:, -1], expected)
        ids[:, 12] = (ids[:, 12] - 2) % 90 + 3  # block 3, which one head reads
        assert not torch.equal(model(ids, use_cache=False).logits[:, -1], expected)


@pytest.mark.parametrize("attention", [POOLED, INDEXED], ids=["pooled_blocks", "indexed_blocks"])
def test_lists_are_no_longer_than_a_short_text(attention, monkeypatch):
    widths, choose = [], blocks.top_blocks

    def look(q, keys, **settings):
        widths.append(settings["selected"])
        return choose(q, keys, **settings)

    monkeypatch.setattr(blocks, "top_blocks", look)
    model = dense_model({**attention, "selected": 3000}).eval()
    ids = torch.randint(3, 96, (1, 30))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        assert widths == [8, 8]
        bt.set_attention(model, "full")
        torch.testing.assert_close(whole, model(ids, use_cache=False).logits, atol=2e-5, rtol=2e-5)


def test_units_of_a_memory_are_those_of_its_keys(load, token_ids):
    """Whatever has happened to it: chunks, steps, rows that change places, tokens taken back."""
    means, bounds = Units("mean", 2, 4), Units("bounds", 4, 4)
    left = torch.tensor([5, 0, 2], dtype=torch.int32)

    def check(layer):
        keys = layer.keys.transpose(1, 2)
        for units in (means, bounds):
            expected = pool_keys(keys, units=units, leftpad=layer.leftpad)
            for b, n in enumerate(layer.leftpad.tolist()):
                count = max(0, (keys.shape[1] - n - units.window) // units.stride + 1)
                rows = slice(n // units.stride, n // units.stride + count)
                assert torch.equal(layer.sums(units)[b, rows], expected[b, rows])
                assert count > 0

    layer = UnitsLayer([means, bounds])
    with torch.inference_mode():
        layer.begin(Call(0, left))
        for new in (13, 1, 1, 300, 2, 1, 1):
            layer.update(*torch.randn(2, 3, 2, new, 16))
            check(layer)
        layer.reorder_cache(torch.tensor([2, 0, 0]))
        layer.update(*torch.randn(2, 3, 2, 3, 16))
        check(layer)
        layer.crop(-6)
        layer.update(*torch.randn(2, 3, 2, 6, 16))
        check(layer)
        layer.keys = layer.keys.flip(0)  # by somebody else
        layer.update(*torch.randn(2, 3, 2, 1, 16))
        check(layer)
        layer.batch_select_indices(torch.tensor([1, 2]))
        layer.batch_repeat_interleave(2)
        layer.update(*torch.randn(2, 4, 2, 5, 16))
        check(layer)
        layer.reset()
        assert layer.get_seq_length() == 0
        assert not layer.unit_stores


def test_index_keys_follow_their_tokens():
    layer = IndexLayer([], [], codes=True)
    index = torch.randn(3, 40, 1, 16)
    rows = torch.tensor([2, 0, 0])
    with torch.inference_mode():
        for first, end in ((0, 20), (20, 21), (21, 33)):
            layer.update(*torch.randn(2, 3, 2, end - first, 16))
            layer.add_index(index[:, first:end])
            layer.add_index(index[:, first:end])
        layer.reorder_cache(rows)
        layer.crop(-5)
        layer.update(*torch.randn(2, 3, 2, 2, 16))
        layer.add_index(index[rows, 28:30])
        codes, scale = layer.index()
        found = codes[:, :30].float() * scale[:, :30, :, None]
        assert (found - index[rows, :30]).abs().max() <= index.abs().max() / 127
        layer.update(*torch.randn(2, 3, 2, 2, 16))
        layer.update(*torch.randn(2, 3, 2, 1, 16))
        with pytest.raises(ValueError, match="tokens 30 to 32 have no index keys"):
            layer.add_index(index[:, :1])


def test_the_index_learns_from_attention_and_nobody_feels_it():
    ids = torch.randint(3, 96, (2, 24))
    for stage in ("dense", "selected"):
        model = dense_model({**INDEXED, "stage": stage}).train()
        plain = model(ids, labels=ids)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.indexed_blocks.query.weight.mul_(-2)
        loss = model(ids, labels=ids).loss
        assert model.mode_loss > 0
        index = {n: p for n, p in model.named_parameters() if "indexed_blocks" in n}
        others = {n: p for n, p in model.named_parameters() if "indexed_blocks" not in n}
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in index.values())
        felt = {n: p.grad.clone() for n, p in others.items()}
        model.zero_grad()
        outputs = model(ids, labels=ids)
        torch.testing.assert_close(outputs.loss - model.mode_loss, loss - model.mode_loss)
        # without the index's own loss the others get the same gradients
        for layer in model.model.layers:
            for parameter in layer.self_attn.indexed_blocks.parameters():
                parameter.requires_grad = False
        outputs = model(ids, labels=ids)
        assert model.mode_loss is None
        outputs.loss.backward()
        if stage == "selected":  # in the other stage attention is dense while the index learns
            for name, parameter in others.items():
                assert torch.equal(parameter.grad, felt[name]), name
        assert plain.loss.isfinite()


def test_the_loss_of_the_index_is_a_divergence():
    """By the formula; zero where both agree; rows of padding and keys not chosen have no part."""
    q, k = torch.randn(2, 12, 4, 16), torch.randn(2, 12, 2, 16)
    iq, ik = torch.randn(2, 12, 2, 16, requires_grad=True), torch.randn(2, 12, 1, 16)
    starts = torch.tensor([3, 0])[:, None].expand(2, 12)
    is_query = torch.arange(12) >= starts
    settings = {"scale": 0.25, "block": 4, "starts": starts, "is_query": is_query}
    indices = torch.tensor([0, -1]).int().expand(2, 12, 2, 2)
    for chosen in (None, indices):
        found = index_loss(iq, ik, q, k, indices=chosen, **settings)
        terms = []
        for b in range(2):
            first = int(starts[b, 0])
            for t in range(first, 12):
                end = t + 1 if chosen is None else min(t + 1, first + 4)
                for h in range(2):
                    keys = k[b, first:end, h]
                    p = (q[b, t, 2 * h : 2 * h + 2] @ keys.T * 0.25).softmax(-1).mean(0)
                    logits = iq[b, t, h] @ ik[b, first:end, 0].T * 16**-0.5
                    terms.append((p * (p.log() - logits.log_softmax(-1))).sum())
        torch.testing.assert_close(found, torch.stack(terms).mean())
    same = index_loss(
        q[:, :, ::2] * 2, k[:, :, :1], q[:, :, ::2].repeat_interleave(2, 2),
        k[:, :, :1].expand(-1, -1, 2, -1), **{**settings, "scale": 0.5},
    )  # fmt: skip
    assert same.abs() <= 1e-5


def test_an_index_starts_near_the_layer_it_comes_to():
    """Heads that share one key are found whole; unlike ones by what they have in common."""
    model = dense_model("full", num_key_value_heads=1)
    with torch.no_grad():
        for layer in model.model.layers:  # heads of one group with one query
            weight = layer.self_attn.q_proj.weight
            weight.copy_(weight[:16].repeat(4, 1))
    bt.set_attention(model, {**INDEXED, "stage": "dense"})
    ids = torch.randint(3, 96, (4, 64))
    near = model.train()(ids, labels=ids)
    near = model.mode_loss
    with torch.no_grad():
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.indexed_blocks.query.weight, 0.0, 0.15)
    model(ids, labels=ids)
    assert near < 0.5 * model.mode_loss


def test_a_trainer_trains_the_index_of_a_frozen_model(tmp_path):
    model = dense_model({**INDEXED, "stage": "dense"})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "indexed_blocks" in name
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    row = torch.randint(3, 96, (32,))
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=12, per_device_train_batch_size=1, learning_rate=2e-2,
        gradient_accumulation_steps=2, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row}] * 24
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("indexed_blocks" not in name), name


def test_a_short_accumulation_counts_each_token_once():
    model = dense_model({**INDEXED, "stage": "dense"}).train()
    ids = torch.randint(3, 96, (2, 24))
    alone = model(ids, labels=ids).loss
    mean = model.mode_loss
    half = model(ids, labels=ids, num_items_in_batch=2 * 2 * 23).loss
    torch.testing.assert_close(half, alone / 2)
    torch.testing.assert_close(model.mode_loss, mean / 2)


def test_recomputed_activations_teach_the_index_the_same():
    model = dense_model({**INDEXED, "stage": "selected"}).train()
    ids, grads = torch.randint(3, 96, (2, 24)), []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable()
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two)


def test_codes_in_the_cache_choose_nearly_the_same_blocks(load, token_ids):
    model = load({**INDEXED, "selected": 4, "index_keys": "int8"}, fuse=False)
    ids, found = token_ids(2, 60), []
    choose = blocks.top_blocks

    def look(q, keys, scale=None, **settings):
        chosen = choose(q, keys, scale=scale, **settings)
        found.append(chosen)
        return chosen

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(blocks, "top_blocks", look)
        model(ids, use_cache=True)
        coded, found = found, []
        model(ids, use_cache=False)
    shared = [
        (a[..., :, None] == b[..., None, :]).any(-1).float().mean()
        for a, b in zip(coded[:1], found)
    ]
    assert min(shared) >= 0.97


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({**POOLED, "selected": 1, "initial": 1}, r"'selected': expected at least 'initial' \+"),
        ({**POOLED, "stride": 3}, "'stride': expected a divisor of 'window'=4, got 3"),
        ({**POOLED, "window": 6, "stride": 3}, "'stride': expected a divisor of 'block'=4, got 3"),
        ({**POOLED, "dense_below": -1}, "'dense_below': expected at least 0, got -1"),
        ({**QUEST, "budget": 10}, "'budget': expected a multiple of 'page'=4, got 10"),
        ({**INDEXED, "index_keys": "int4"}, "expected a 'index_keys' out of: float, int8"),
        ({**INDEXED, "stage": "warm"}, "expected a 'stage' out of: dense, selected"),
        (
            {"prefill": INDEXED, "decode": {**INDEXED, "index_keys": "int8"}},
            "'index_keys': expected the same in both phases",
        ),
    ],
)
def test_settings_out_of_range_are_named(attention, message):
    with pytest.raises(ValueError, match=message):
        AttentionPlan.from_config(attention).check_layers(2)


def test_what_they_cannot_do_is_refused_by_name(load, token_ids):
    ids = token_ids(2, 12)
    model = load(INDEXED)
    with pytest.raises(ValueError, match="'indexed_blocks' keeps index keys in a cache of its own"):
        model.generate(ids, cache_implementation="static", max_new_tokens=3, do_sample=False)
    for name in BLOCK_MODES.values():
        mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
        with pytest.raises(ValueError, match="takes padding on one side of a row"):
            load(name)(ids, attention_mask=mask, use_cache=False)
    with torch.inference_mode():
        cache = load("full")(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="'indexed_blocks' keeps index keys in a cache of its"):
            model(ids[:, :1], past_key_values=cache)


def test_packed_texts_choose_each_for_itself():
    places = torch.cat([torch.arange(9), torch.arange(21)])[None]
    ids = torch.randint(3, 96, (1, 30))
    for attention in (POOLED, INDEXED, QUEST, {**POOLED, "dense_below": 10}):
        model = dense_model(attention).eval()
        with torch.no_grad():
            packed = model(ids, position_ids=places, use_cache=False).logits
            for first, end in ((0, 9), (9, 30)):
                alone = model(ids[:, first:end], use_cache=False).logits
                torch.testing.assert_close(packed[:, first:end], alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attention", [{**POOLED, "selected": 5}, {**QUEST, "budget": 20}])
def test_autocast_reads_a_cache_of_wider_keys(attention):
    """Rotated keys stay float32, and the units made of them; all are chosen: none by a rounding."""
    model = bt.BitNetForCausalLM(bt.BitNetConfig(**SIZES, attention=attention)).eval()
    ids = torch.randint(3, 96, (2, 19))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(ids, use_cache=False).logits.float()
        cache = model(ids[:, :11], use_cache=True).past_key_values
        assert cache.layers[0].keys.dtype == torch.float32
        found = model(ids[:, 11:], past_key_values=cache).logits.float()
    assert (found - whole[:, 11:]).norm() <= 0.1 * whole[:, 11:].norm()
