"""Continuous batching of layers with a window: pages are shared, read in place, and given back."""

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

import bitnet_triton
from bitnet_triton import BitNetConfig, BitNetForCausalLM
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.modes.sliding import Sliding

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the cache of continuous batching before transformers 5.23 has another layout",
)
PAGE, WINDOW, NEW = 16, 40, 4
SIZES = {
    "vocab_size": 24, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
# Prompts are cut otherwise than in `generate`, which may turn a code of an activation
_CLEAR = 0.02


def sliding(window=WINDOW, sinks=0):
    return {"mode": "sliding", "window": window, "sinks": sinks}


def layered(*modes):
    return {"prefill": [*modes], "decode": [*modes]}


PLANS = {
    "sliding": sliding(),
    "sinks": sliding(sinks=20),
    "hybrid": layered(sliding(), "full", sliding()),
    "windows": layered(sliding(7), sliding(), "full"),
}


@pytest.fixture(params=PLANS)
def model(request):
    return built(attention=PLANS[request.param])


def built(**more):
    model = BitNetForCausalLM(BitNetConfig(**SIZES, **more)).eval()
    model.set_attn_implementation("bitnet_triton")
    return model


def greedy(**more):
    wanted = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.0}
    return GenerationConfig(**wanted | more, eos_token_id=None, pad_token_id=0)


def settings(**more):
    return ContinuousBatchingConfig(
        **{"page_size": PAGE, "num_blocks": 120, "max_batch_tokens": 64} | more
    )


def draw(length):
    return torch.randint(2, 24, (length,)).tolist()


def drawn(model, prefix, lengths, new=NEW, **more):
    """Draw prompts, of a prefix and so many tokens; return them and what ``generate`` writes.

    Texts end where they are not clear of ties: most have two tokens that are.
    """
    wanted = greedy(max_new_tokens=new, output_logits=True, return_dict_in_generate=True)
    found = []
    for length in lengths:
        for _ in range(8):
            prompt = prefix + draw(length)
            made = model.generate(torch.tensor([prompt]), generation_config=wanted, **more)
            best = torch.stack(made.logits).topk(2).values[:, 0]
            clear = int((best[:, 0] - best[:, 1] >= _CLEAR).int().cumprod(0).sum())
            if clear >= 2:
                break
        found.append((prompt, made.sequences[0, len(prompt) :][:clear].tolist()))
    assert sum(len(text) for _, text in found) >= len(found)
    return [prompt for prompt, _ in found], [text for _, text in found]


class Watched:
    """An engine that counts tokens, looks after its pages in every step, and ends."""

    def __init__(self, model, new=NEW, **more):
        self.model, self.computed, self.held = model, 0, []
        self.manager = model.init_continuous_batching(greedy(max_new_tokens=new), settings(**more))

    def __enter__(self):
        layer = self.model.model.layers[0].self_attn
        self._hook = layer.register_forward_pre_hook(self._look, with_kwargs=True)
        self.manager.start()
        return self

    def __exit__(self, *args):
        self._hook.remove()
        self.manager.stop(hard_stop=True)

    def _look(self, module, args, kwargs):
        self.computed += kwargs["hidden_states"].shape[1]
        check_counts(kwargs["cache"])
        tables = kwargs["cache"].cache_allocators["sliding_attention"].block_table
        self.held.append({name: sum(map(bool, table)) for name, table in tables.items()})

    def texts(self, names):
        """Return the answers to requests, in the order of their names."""
        done = {}
        while not {*names} <= done.keys():
            one = self.manager.get_result(timeout=60)
            assert one is not None
            assert one.error is None
            done[one.request_id] = one.generated_tokens
        return [done[name] for name in names]

    def answers(self, prompts):
        return self.texts([self.manager.add_request(prompt) for prompt in prompts])


def check_counts(cache):
    """Every page is free, kept, or held by as many requests as the ledger says."""
    for allocator in cache.cache_allocators.values():
        ledger, pool = allocator.ledger, allocator.pool
        held = Counter(page for table in allocator.block_table.values() for page in table if page)
        assert {page: n for page, n in held.items() if n > 1} == ledger.shared_ref_counts
        assert not held.keys() & ledger.cached_blocks.keys()
        trees = pool._free_blocks[allocator.index].trees
        free = [page for leaves in trees.values() for page in leaves]
        every = [*held, *ledger.cached_blocks, *free]
        assert len(set(every)) == len(every)
        assert len(every) % allocator.blocks_per_sector == 0
        names = {page: name for name, page in ledger.hash_to_block.items()}
        assert names == ledger.block_to_hash
        assert not names.keys() & set(free)


def agree(texts, wanted, new=NEW):
    """Compare texts as far as they are clear of ties."""
    assert [len(text) for text in texts] == [new] * len(texts)
    assert [text[: len(clear)] for text, clear in zip(texts, wanted)] == wanted


def test_mixed_requests_get_the_tokens_of_generate(model):
    """Prompts of several steps, longer than the window and shorter, beside decode steps."""
    lengths = (3, 60, 17, 100, 1, 250, WINDOW - 1, WINDOW, PAGE)
    many, wanted = drawn(model, [], lengths, 16)
    with Watched(model, 16) as engine:
        agree(engine.answers(many), wanted, 16)


@pytest.mark.parametrize(
    ("prefix", "budget"), [(WINDOW // 2, 64), (8 * PAGE, 512), (200, 64)],
    ids=["short", "whole", "long"],
)  # fmt: skip
def test_requests_that_come_together_compute_their_prefix_once(model, prefix, budget):
    many, wanted = drawn(model, draw(prefix), (1, 3, 60, 8, 5, 9, 30, 18))
    with Watched(model, max_batch_tokens=budget) as engine:
        agree(engine.answers(many), wanted)
        shared = prefix // PAGE * PAGE
        tails = sum(len(prompt) - shared for prompt in many)
        decoded = len(many) * (NEW - 1)  # the first token comes of the prompt
        assert engine.computed - decoded == shared + tails


def test_one_after_the_other_begins_behind_what_was_given_back(model):
    """The first text goes on for windows behind the prefix, and no other request holds it."""
    first = draw(10 * PAGE)
    many, wanted = drawn(model, first, (200, 5, 90))
    shorter = drawn(model, first[: 4 * PAGE], (20,))
    with Watched(model) as engine:
        for prompt, text, shared in zip(many + shorter[0], wanted + shorter[1], (0, 10, 10, 4)):
            before = engine.computed
            agree(engine.answers([prompt]), [text])
            assert engine.computed - before == len(prompt) - shared * PAGE + NEW - 1


def test_who_waits_for_a_prefix_begins_when_the_other_is_gone(model):
    first = draw(150)
    many, wanted = drawn(model, first, (4, 5, 60))
    with Watched(model, max_batch_tokens=16) as engine:
        names = [engine.manager.add_request(prompt) for prompt in many]
        while len(engine.held) < 4:  # in the middle of its prompt
            assert engine.manager.is_running()
            time.sleep(0.001)
        engine.manager.cancel_request(names[0])
        agree(engine.texts(names[1:]), wanted[1:])


def test_requests_that_are_put_off_for_want_of_pages_write_the_same(model):
    """The engine computes what they have written once more."""
    new = 50
    many, wanted = drawn(model, [], [20] * 4, new)
    with Watched(model, new, num_blocks=12) as engine:
        agree(engine.answers(many), wanted, new)
        assert engine.computed > sum(map(len, many)) + len(many) * (new - 1)


@pytest.mark.parametrize("is_shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("sinks", [0, 20])
def test_a_text_longer_than_memory_holds_its_window(is_shared, sinks):
    model, new = built(attention=sliding(sinks=sinks)), 40
    many, wanted = drawn(model, [], [500], new)
    with Watched(
        model, new, num_blocks=10, max_batch_tokens=PAGE, allow_block_sharing=is_shared
    ) as engine:
        agree(engine.answers(many), wanted, new)
    held = [max(step.values()) for step in engine.held]
    most = WINDOW // PAGE + 2 + -(-sinks // PAGE)
    assert max(held[-new + 1 :]) <= most
    assert max(held) <= most + 1  # with a part of the prompt, which is computed


def test_several_answers_to_a_prompt_share_its_pages(model):
    (prompt,), wanted = drawn(model, [], [100], 20)
    done = model.generate_batch(
        [prompt],
        generation_config=greedy(
            max_new_tokens=20, num_return_sequences=3, do_sample=True, top_k=1
        ),
        continuous_batching_config=settings(),
    )
    agree([one.generated_tokens for one in done.values()], wanted * 3, 20)


def test_a_window_of_the_config_that_no_layer_has_is_none():
    """``generate`` reads everything then, and so does the engine."""
    model = built(sliding_window=8, layer_types=["sliding_attention"] * 3)
    many, wanted = drawn(model, [], (60, 30, 5))
    done = model.generate_batch(
        many, generation_config=greedy(), continuous_batching_config=settings()
    )
    agree([one.generated_tokens for one in done.values()], wanted)


def test_fused_layers_with_a_window_get_the_tokens_of_generate():
    """The embedded model, whose frequencies are those of the longest text in the engine."""
    path = Path(bitnet_triton.__file__).parent / "assets" / "tiny"
    model = BitNetForCausalLM.from_pretrained(path, attention=PLANS["sinks"], dtype=torch.float32)
    assert "Fused" in type(model.model.layers[0]).__name__
    many, wanted = drawn(
        model, [], (5, 70, 90), context_length=model.config.max_position_embeddings
    )
    done = model.generate_batch(
        many, generation_config=greedy(), continuous_batching_config=settings()
    )
    agree([one.generated_tokens for one in done.values()], wanted)


@pytest.mark.parametrize(
    ("attention", "cache", "said"),
    [
        ({"mode": "streaming", "window": 8, "sinks": 2}, None, "layer 0 has 'streaming'"),
        ({"prefill": "full", "decode": sliding()}, None, "layer 0 has 'full and then sliding'"),
        ("full", "h2o", "`cache`: .* got 'h2o'"),
    ],
    ids=["mode", "phases", "memory"],
)
def test_other_plans_are_refused_by_name(attention, cache, said):
    model = built(attention=attention, cache=cache)
    with pytest.raises(ValueError, match=said):
        model.init_continuous_batching(greedy(), settings())


def test_pages_that_wait_on_the_cpu_are_refused_by_name():
    model = built(attention=sliding())
    with pytest.raises(ValueError, match="`cpu_offload_space`: expected 0 beside `attention`"):
        model.init_continuous_batching(greedy(), settings(cpu_offload_space=0.5))


@pytest.mark.parametrize("attention", [None, "full", sliding()], ids=str)
def test_a_request_with_children_leaves_the_pages_of_others_alone(attention):
    """It has room for a page that its step does not read, and others come behind it."""
    model, misfits = built(attention=attention), []

    def look(module, args, kwargs):
        for allocator, read in zip(kwargs["cache"].cache_allocators.values(), kwargs["read_index"]):
            used = kwargs["cu_seq_lens_k"][allocator.layer_type].diff()
            if len(read) and sum(-(-each // PAGE) for each in used.tolist()) != len(read):
                misfits.append((used.tolist(), len(read)))

    model.model.layers[0].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    wanted = greedy(do_sample=True, top_k=1, num_return_sequences=2)
    manager = model.init_continuous_batching(wanted, settings())
    for length in (60, 17, 17, 17):
        manager.add_request(draw(length))
    manager.start()
    done = [manager.get_result(timeout=60) for _ in range(8)]
    manager.stop(hard_stop=True)
    assert all(one is not None and one.error is None for one in done)
    assert not misfits


def test_pages_that_an_asynchronous_engine_gave_back_unnamed_are_found_by_nobody():
    """It prepares a step before it looks at the tokens of the one before."""
    model = built(attention=PLANS["hybrid"])
    manager = model.init_continuous_batching(greedy(), settings(max_batch_tokens=96))
    cache = manager._create_batch_processor().cache
    text, steps = draw(150), []
    first = RequestState("first", initial_tokens=text)
    first.status = RequestStatus.PREFILLING
    for tokens in (48, 96):
        assert cache.can_store_request_tokens(first, tokens)
        steps.append(cache.count_new_complete_blocks(first, tokens))
        first.position_offset += tokens
    for complete in steps:
        cache.mark_complete_blocks(first, complete)
    check_counts(cache)
    assert 0 not in cache.cache_allocators["sliding_attention"].ledger.block_to_hash


def test_a_name_that_comes_again_names_its_own_pages():
    model = built(attention=sliding())
    first, second, tail = draw(100), draw(100), draw(20)
    with Watched(model) as engine:
        for prompt in (first, second):
            engine.texts([engine.manager.add_request(prompt, request_id="again")])
        before = engine.computed
        engine.answers([second + tail])
        assert engine.computed - before == 120 - 6 * PAGE + NEW - 1


@pytest.mark.parametrize("kind", [Full, Sliding])
def test_a_mode_that_attends_in_its_own_way_says_that_pages_do_not_serve_it(kind):
    class Own(kind):
        def __call__(self, q, k, v, context):
            return 2 * super().__call__(q, k, v, context)

    settings = () if kind is Full else (40, 3)
    assert kind(*settings).pages_mask == kind(*settings).mask
    assert Own(*settings).pages_mask is None
