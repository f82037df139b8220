"""Greedy decoding: the tokens of transformers' own loop, without their logits."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.streamers import BaseStreamer

import bitnet_triton as bt
from bitnet_triton.models.bitnet import greedy
from bitnet_triton.models.bitnet.ahead import Told, can_run_ahead
from bitnet_triton.models.bitnet.greedy import tell_once
from bitnet_triton.models.fused.recording import Recording
from bitnet_triton.nn.head import Int8Head, OutputHead

IDS = torch.tensor([[1, 5, 23, 71, 8, 40]])
PADDED = torch.tensor([[0, 0, 0, 1, 9, 30], [1, 5, 23, 71, 8, 40]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
PLANS = {
    "sliding": {"mode": "sliding", "window": 5, "sinks": 2},
    "streaming": {"mode": "streaming", "window": 4, "sinks": 1},
    "phases": {"prefill": {"mode": "sliding", "window": 4}, "decode": "full"},
}

pytestmark = pytest.mark.usefixtures("default_backend")


def generate(model, ids=IDS, n=10, eos=None, **kwargs):
    return model.generate(
        ids, max_new_tokens=n, eos_token_id=eos, pad_token_id=0, do_sample=False,
        **kwargs,
    )  # fmt: skip


def theirs(model, *args, **kwargs):
    """Generate with transformers' own loop."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bt.BitNetForCausalLM, "_sample", GenerationMixin._sample)
        return generate(model, *args, **kwargs)


@pytest.fixture
def topk_calls(monkeypatch):
    """Count how often the head says the best token itself."""
    calls = []
    for kind in (OutputHead, Int8Head):

        def count(head, *args, topk=kind.topk):
            calls.append(head)
            return topk(head, *args)

        monkeypatch.setattr(kind, "topk", count)
    return calls


@pytest.fixture
def assert_same(topk_calls):
    """Compare with transformers' own loop, and return the tokens."""

    def assert_same(model, **kwargs):
        topk_calls.clear()
        expected = theirs(model, **kwargs)
        assert not topk_calls
        actual = generate(model, **kwargs)
        assert torch.equal(actual, expected)
        assert topk_calls
        return actual

    return assert_same


@pytest.fixture
def load(checkpoint):
    return lambda **kwargs: bt.BitNetForCausalLM.from_pretrained(checkpoint(), **kwargs)


@pytest.mark.parametrize("fuse", [True, False])
def test_tokens_are_those_of_transformers(load, topk_calls, fuse):
    model = load(fuse=fuse)
    tokens = generate(model)
    assert tokens.shape == (1, 16)
    assert len(topk_calls) == 9  # the first token comes with the prompt
    assert torch.equal(tokens, theirs(model))
    assert len(topk_calls) == 9


def test_steps_are_recorded(load, monkeypatch):
    seen, replay = [], Recording.replay

    def count(recording, *args):
        seen.append(recording)
        return replay(recording, *args)

    monkeypatch.setattr(Recording, "replay", count)
    generate(load())
    assert len(set(map(id, seen))) == 1
    assert len(seen) >= 7


@pytest.mark.parametrize("plan", PLANS)
def test_attention_plans(load, assert_same, plan):
    assert_same(load(attention=PLANS[plan]))
    assert_same(load(attention=PLANS[plan]), ids=PADDED, attention_mask=MASK)


def test_padded_rows(load, assert_same):
    model = load()
    tokens = assert_same(model, ids=PADDED, attention_mask=MASK)
    alone = generate(model, ids=PADDED[:1, 3:])
    assert torch.equal(tokens[:1, 6:], alone[:, 3:])


def test_rows_that_end_are_padded(load, assert_same):
    model = load()
    tokens = generate(model, ids=PADDED, attention_mask=MASK)
    eos = int(tokens[0, 8])  # the third new token of the first row
    ended = assert_same(model, ids=PADDED, attention_mask=MASK, eos=eos)
    assert (ended[0, 9:] == 0).all()
    assert_same(model, ids=PADDED[1:], eos=int(tokens[1, 7]))


def test_int8_head(load, assert_same):
    assert_same(bt.quantize_head(load()))


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamers_get_every_token(load):
    streamer = Collector()
    tokens = generate(load(), streamer=streamer)
    assert streamer.tokens == tokens[0].tolist()
    assert streamer.ended


@pytest.fixture
def ahead(monkeypatch):
    """Run a step ahead as on a GPU; count the steps of the decoder."""
    steps = []
    monkeypatch.setattr(
        greedy, "can_run_ahead", lambda device, cache: can_run_ahead(torch.device("cuda"), cache)
    )

    def count(self, ids, call=greedy._Steps.__call__):
        steps.append(ids)
        return call(self, ids)

    monkeypatch.setattr(greedy._Steps, "__call__", count)
    return steps


def end_at(model, place, ids=IDS, **kwargs):
    """Return the token that is written at a place: as end of text, it ends there."""
    tokens = theirs(model, ids=ids, n=place, **kwargs)[0, ids.shape[1] :].tolist()
    return tokens[-1], tokens.index(tokens[-1]) + 1


def assert_same_cache(actual, expected):
    assert actual.get_seq_length() == expected.get_seq_length()
    for layer, other in zip(actual.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys)
        torch.testing.assert_close(layer.values, other.values)


@pytest.mark.parametrize("own_cache", [False, True])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_step_ahead_is_taken_back(load, ahead, fuse, own_cache):
    model = load(fuse=fuse)
    eos, written = end_at(model, 6)

    def run(loop):
        cache = {"past_key_values": DynamicCache()} if own_cache else {}
        return loop(model, n=12, eos=eos, return_dict_in_generate=True, **cache)

    expected, actual = run(theirs), run(generate)
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(ahead) == written  # one of them too many
    assert_same_cache(actual.past_key_values, expected.past_key_values)


def test_no_step_is_ahead_of_the_last_one(load, ahead):
    model = load()
    settings = {"n": 7, "return_dict_in_generate": True}
    expected, actual = theirs(model, **settings), generate(model, **settings)
    assert torch.equal(actual.sequences, expected.sequences)
    assert len(ahead) == 6
    assert_same_cache(actual.past_key_values, expected.past_key_values)


def test_rows_that_end_apart_with_a_step_ahead(load, ahead):
    model, ids = load(), torch.cat([IDS, IDS.flip(1)])
    for place in (3, 5):
        eos, _ = end_at(model, place, ids)
        settings = {"ids": ids, "n": 9, "eos": eos, "return_dict_in_generate": True}
        expected, actual = theirs(model, **settings), generate(model, **settings)
        assert torch.equal(actual.sequences, expected.sequences)
        assert_same_cache(actual.past_key_values, expected.past_key_values)


def test_padding_is_looked_at_before_a_step(load, ahead):
    model = load()
    eos, _ = end_at(model, 6, PADDED[:1], attention_mask=MASK[:1])
    settings = {"ids": PADDED[:1], "attention_mask": MASK[:1], "n": 12, "eos": eos}
    tokens = generate(model, **settings)
    assert torch.equal(tokens, theirs(model, **settings))
    assert len(ahead) == tokens.shape[1] - PADDED.shape[1] - 1


def test_a_cache_of_another_kind_is_not_run_ahead_of(load, ahead):
    class Counting(DynamicCache):
        updates = 0

        def update(self, *args, **kwargs):
            self.updates += 1
            return super().update(*args, **kwargs)

    model = load(fuse=False)
    eos, written = end_at(model, 6)
    cache = Counting()
    generate(model, n=12, eos=eos, past_key_values=cache)
    assert cache.updates == written * len(cache.layers)


def test_a_step_that_fails_fails_only_if_it_is_wanted(load, ahead, monkeypatch):
    model = load()
    eos, written = end_at(model, 6)
    expected = theirs(model, n=12, eos=eos)

    def fail(self, ids, call=greedy._Steps.__call__):
        if ids.shape[1] == IDS.shape[1] + written:
            raise torch.OutOfMemoryError
        return call(self, ids)

    monkeypatch.setattr(greedy._Steps, "__call__", fail)
    assert torch.equal(generate(model, n=12, eos=eos), expected)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, n=12)


def test_a_value_on_its_way_from_a_gpu_is_waited_for(monkeypatch):
    order = []

    class Event:
        def record(self, stream):
            order.append(f"record on {stream}")

        def synchronize(self):
            order.append("synchronize")

    class OnGpu:
        is_cuda, device = True, "cuda:1"

        def to(self, device, non_blocking):
            order.append(f"to {device} {non_blocking}")
            return torch.tensor(7)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    told = Told(OnGpu())
    assert order == ["to cpu True", "record on stream of cuda:1"]
    assert told.read() == 7
    assert order[2:] == ["synchronize"]


def test_windows_cannot_step_back(load, ahead):
    model = load(attention=PLANS["sliding"])
    eos, written = end_at(model, 6)
    assert torch.equal(generate(model, n=12, eos=eos), theirs(model, n=12, eos=eos))
    assert len(ahead) == written - 1


def test_an_interrupt_leaves_the_cache_as_the_tokens_stand(load, ahead):
    class Impatient(BaseStreamer):
        put_calls = 0

        def put(self, value):
            self.put_calls += 1
            if self.put_calls == 5:
                raise KeyboardInterrupt

        def end(self):
            pass

    model, cache = load(), DynamicCache()
    with pytest.raises(KeyboardInterrupt):
        generate(model, streamer=Impatient(), past_key_values=cache)
    assert cache.get_seq_length() == IDS.shape[1] + 3  # the prompt and four tokens but the last


def test_a_second_turn_continues_the_cache(load):
    model = load()
    first = generate(model, n=4, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, torch.tensor([[7, 9]])], 1)
    second = generate(model, ids=longer, n=4, past_key_values=first.past_key_values)
    assert torch.equal(second, theirs(model, ids=longer, n=4))


LEFT = {
    "processed scores": {"repetition_penalty": 1.3},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 2},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "attention": {"return_dict_in_generate": True, "output_hidden_states": True},
    "a static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("asked", LEFT)
def test_what_needs_logits_is_left_to_transformers(load, topk_calls, asked):
    with torch.compiler.set_stance("force_eager"):
        output = load().generate(
            IDS, **{"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0} | LEFT[asked]
        )
    assert not topk_calls
    assert output is not None


def test_hooks_see_their_modules(load, topk_calls):
    model, seen = load(), []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    generate(model)
    assert len(seen) == 10
    assert not topk_calls
    handle.remove()
    generate(model)
    assert len(topk_calls) == 9


def test_a_forward_that_was_replaced_runs(load, topk_calls):
    model, calls = load(), []
    forward = model.forward

    def replaced(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = replaced
    generate(model)
    assert len(calls) == 10
    assert not topk_calls


def test_prompts_as_embeddings(load, assert_same):
    model = load()
    embeddings = model.get_input_embeddings()(IDS)
    assert_same(model, ids=None, inputs_embeds=embeddings)
    assert_same(model, ids=None, inputs_embeds=embeddings, attention_mask=MASK[1:])


FORBIDDEN = 85


class Forbidding(bt.BitNetForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., FORBIDDEN] = float("-inf")
        return output


class OtherHead(OutputHead):
    def forward(self, input):
        return -super().forward(input)


def test_a_forward_of_a_subclass_runs(checkpoint, topk_calls):
    generate(Forbidding.from_pretrained(checkpoint()))
    assert not topk_calls


def test_a_forward_that_a_class_was_given_runs(load, topk_calls, monkeypatch):
    model, forward = load(), bt.BitNetForCausalLM.forward
    monkeypatch.setattr(bt.BitNetForCausalLM, "forward", lambda *args, **kw: forward(*args, **kw))
    generate(model)
    assert not topk_calls


def test_another_head_says_what_it_wants(load, topk_calls):
    model = load()
    expected = generate(model)
    model.lm_head.__class__ = OtherHead
    topk_calls.clear()
    assert not torch.equal(generate(model), expected)
    assert not topk_calls


def test_global_hooks_see_every_step(load, topk_calls):
    model, seen = load(), []
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module))
    ):
        generate(model)
    assert seen.count(OutputHead) == 10
    assert seen.count(type(model.model.norm)) > 10
    assert not topk_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_left_to_transformers(checkpoint, topk_calls, dtype):
    model = bt.BitNetForCausalLM.from_pretrained(checkpoint(), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16 if dtype == torch.float32 else torch.float16):
        generate(model)
    assert not topk_calls


def test_positions_of_a_turn_that_begin_again(load):
    model = load()
    first = generate(model, n=4, return_dict_in_generate=True)
    more = torch.tensor([[7, 9, 11]])
    turns = []
    for run in (theirs, generate):
        cache = copy.deepcopy(first.past_key_values)
        mask = torch.ones(1, cache.get_seq_length() + 3, dtype=torch.long)
        turns.append(
            run(
                model, ids=more, n=6, past_key_values=cache, attention_mask=mask,
                position_ids=torch.arange(3)[None],
            )
        )  # fmt: skip
    assert torch.equal(*turns)


def test_the_log_says_once_which_loop_runs(load, caplog):
    tell_once.cache_clear()
    model = load()
    with caplog.at_level("INFO", logger="bitnet_triton"):
        for _ in range(2):
            generate(model)
            generate(model, repetition_penalty=1.3)
    told = [record.message for record in caplog.records if "loop" in record.message]
    assert told == ["generate runs transformers' loop: scores are processed"]
    assert sum("no logits" in record.message for record in caplog.records) == 1
