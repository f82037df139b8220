"""transformers' continuous batching over our attention writes what ``generate`` writes."""

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig

import bitnet_triton
from bitnet_triton import BitNetConfig, BitNetForCausalLM
from bitnet_triton.attention.hub import pages

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the cache of continuous batching before transformers 5.23 has another layout",
)
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GREEDY = {
    "max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.0, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    BitNetForCausalLM(BitNetConfig(**SIZES)).save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return BitNetForCausalLM.from_pretrained(
        folder, attn_implementation="bitnet_triton", dtype=torch.float32
    )


def settings(**more):
    """Return a small engine, which splits prompts and shares pages."""
    return ContinuousBatchingConfig(
        **{"page_size": 16, "num_blocks": 40, "max_batch_tokens": 48} | more
    )


def prompts(*lengths):
    return [torch.randint(3, 96, (n,)).tolist() for n in lengths]


def written(model, many, **kwargs):
    """Return what ``generate`` writes for each prompt by itself."""
    rows = [
        model.generate(torch.tensor([p]), generation_config=greedy(), **kwargs)[0] for p in many
    ]
    return [row[len(p) :].tolist() for row, p in zip(rows, many)]


def greedy(**more):
    return GenerationConfig(**GREEDY | more)


def batched(model, many, **more):
    done = model.generate_batch(
        many, generation_config=greedy(), continuous_batching_config=settings(**more)
    )
    assert [one.error for one in done.values()] == [None] * len(many)
    return [one.generated_tokens for one in done.values()]


def test_mixed_requests_get_the_tokens_of_generate(model, monkeypatch):
    """Prompts of several steps beside decode steps, with a prefix that two of them share."""
    calls, attend = [], pages.flash_attention
    tables, block_table_of = [], pages.block_table_of

    def count(*args, **kwargs):
        calls.append("block_table" in kwargs)
        return attend(*args, **kwargs)

    def count_tables(*args):
        tables.append(args)
        return block_table_of(*args)

    monkeypatch.setattr(pages, "flash_attention", count)
    monkeypatch.setattr(pages, "block_table_of", count_tables)
    many = prompts(3, 60, 17, 100, 1)
    many.append(many[3][:64] + many[0])
    expected = written(model, many)
    assert not calls
    assert batched(model, many) == expected
    assert calls.count(True) > 10  # read in pages
    assert calls.count(True) == len(tables) * SIZES["num_hidden_layers"]  # once a step


def clear_texts(model, draw, new=3):
    """Draw prompts until every text is chosen clear of ties; return both.

    Prompts are cut otherwise than in ``generate``, and codes of activations may be others.
    """
    wanted = greedy(max_new_tokens=new, output_logits=True, return_dict_in_generate=True)
    for _ in range(200):
        texts = []
        for prompt in draw():
            made = model.generate(torch.tensor([prompt]), generation_config=wanted)
            best = torch.stack(made.logits).topk(2).values
            if (best[..., 0] - best[..., 1]).min() < 0.02:
                break
            texts.append((prompt, made.sequences[0, len(prompt) :].tolist()))
        else:
            return texts
    raise AssertionError("no texts clear of ties")


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_requests_that_come_together_compute_their_prefix_once(model, scheduler):
    """Two have twice the prefix, and one has no part in it."""

    def draw():
        prefix, *tails, alone = prompts(64, 1, 3, 6, 8, 5, 9, 40)
        once, twice = tails[:4], tails[4:]
        return [prefix + tail for tail in once] + [2 * prefix + tail for tail in twice] + [alone]

    drawn = clear_texts(model, draw)
    computed = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: computed.append(args[0].numel())
    )
    try:
        done = model.generate_batch(
            [prompt for prompt, _ in drawn], generation_config=greedy(max_new_tokens=3),
            continuous_batching_config=settings(scheduler_type=scheduler, num_blocks=200),
        )  # fmt: skip
    finally:
        hook.remove()
    assert [one.generated_tokens for one in done.values()] == [text for _, text in drawn]
    decoded = sum(len(text) - 1 for _, text in drawn)  # the first token comes of the prompt
    assert sum(computed) - decoded == 2 * 64 + (1 + 3 + 6 + 8) + (5 + 9) + 40


def test_who_waits_for_a_prefix_begins_when_the_other_is_gone(model):
    def draw():
        prefix, *tails = prompts(100, 4, 5, 6)
        return [prefix + tail for tail in tails]

    drawn = clear_texts(model, draw)
    with model.continuous_batching_context_manager(
        greedy(max_new_tokens=3), continuous_batching_config=settings(max_batch_tokens=16)
    ) as manager:
        names = [manager.add_request(prompt) for prompt, _ in drawn]
        manager.cancel_request(names[0])  # at once, or while its prompt is computed
        done = {}
        while not {*names[1:]} <= done.keys():
            one = manager.get_result(timeout=60)
            assert one is not None
            done[one.request_id] = one.generated_tokens
    assert [done[name] for name in names[1:]] == [text for _, text in drawn[1:]]


def test_a_model_with_a_plan_of_other_modes_is_refused_by_name(folder):
    model = BitNetForCausalLM.from_pretrained(folder, attention={"mode": "local", "block": 8})
    assert model.config._attn_implementation == "bitnet_triton"
    with pytest.raises(ValueError, match="layer 0 has 'local'"):
        model.init_continuous_batching(greedy(), settings())


@pytest.mark.parametrize(
    "wanted",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 6, "eos_token_id": list(range(3, 60))},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2},
    ],
    ids=["penalty", "lengths", "draws"],
)
def test_what_the_engine_would_drop_is_done_for_each_request(model, wanted):
    """A manager's settings, with requests beside that have their own."""
    many, beside = prompts(5, 60, 17), prompts(30, 4)
    expected = []
    for seed, prompt in enumerate(many):
        torch.manual_seed(seed)
        row = model.generate(torch.tensor([prompt]), generation_config=greedy(**wanted))[0]
        expected.append(row[len(prompt) :].tolist())
    plain = written(model, beside)
    with model.continuous_batching_context_manager(
        greedy(**wanted), continuous_batching_config=settings()
    ) as manager:
        names = [manager.add_request(prompt, seed=n) for n, prompt in enumerate(many)]
        off = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        off |= {"min_new_tokens": 0, "eos_token_id": 2}  # the model's own, where `plain` ends
        names += [manager.add_request(prompt, **off) for prompt in beside]
        wrong = manager.add_request(many[0], temprature=1.0)
        done = {}
        while len(done) < len(names) + 1:
            one = manager.get_result(timeout=60)
            done[one.request_id] = one
    assert [done[name].generated_tokens for name in names] == expected + plain
    assert "`temprature`: expected a setting of a request" in done[wrong].error


def test_requests_that_have_to_wait_for_pages_choose_the_same(model):
    """The engine puts them off, and computes what they have written once more."""
    many = prompts(60, 60, 60, 60)
    expected = [
        model.generate(
            torch.tensor([p]), generation_config=greedy(max_new_tokens=30, repetition_penalty=1.3)
        )[0][60:].tolist()
        for p in many
    ]
    done = model.generate_batch(
        many, generation_config=greedy(max_new_tokens=30, repetition_penalty=1.3),
        continuous_batching_config=settings(num_blocks=20, allow_block_sharing=False),
    )  # fmt: skip
    assert [one.generated_tokens for one in done.values()] == expected


def test_what_the_engine_has_no_place_for_is_refused_by_name(model):
    with pytest.raises(ValueError, match="`num_beams`: transformers' continuous"):
        model.init_continuous_batching(greedy(num_beams=2), settings())
    model.generation_config.guidance_scale = 1.5  # what `generate` takes where none is given
    with pytest.raises(ValueError, match="`guidance_scale`: transformers' continuous"):
        model.init_continuous_batching(greedy(), settings())


def test_tables_come_from_the_pages_that_are_read():
    table = pages.block_table_of(
        torch.tensor([3, 1, 2]), torch.tensor([6, 1], dtype=torch.int32), 4
    )
    assert table[0].tolist() == [3, 1]
    assert table[1, 0] == 2


def test_packed_weights_as_loaded_write_the_same_tokens():
    """The embedded model, fused as it is loaded, without the penalty that the engine drops."""
    model = BitNetForCausalLM.from_pretrained(
        Path(bitnet_triton.__file__).parent / "assets" / "tiny",
        attn_implementation="bitnet_triton", dtype=torch.float32,
    )  # fmt: skip
    assert "Fused" in type(model.model.layers[0]).__name__
    many = prompts(5, 70, 20)
    # whose frequencies depend on the length of a text: those of the longest, for all requests
    longest = model.config.max_position_embeddings
    assert batched(model, many) == written(model, many, context_length=longest)
