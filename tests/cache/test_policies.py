"""Every memory that drops tokens by scores, against attention over what its policy should keep."""

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.attention import AttentionContext
from bitnet_triton.attention.context import LayerInputs
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.tokens import Tokens
from bitnet_triton.cache import parse_memory

NAMES = ["h2o", "snapkv", "expected_attention", "latest"]
each = pytest.mark.parametrize("name", NAMES)
each_of_prompts = pytest.mark.parametrize("name", [*NAMES, "kvzip"])
each_text = pytest.mark.parametrize("name", [*NAMES, "h2o_average"])
SETTINGS = {
    "snapkv": {"window": 16},
    "expected_attention": {"least": 16},
    "kvzip": {"least": 16},
}
QUIET = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}


def named(name, budget):
    return {"name": name, "budget": budget, **SETTINGS.get(name, {})}


def bytes_of(memory):
    stores = {t.data_ptr(): t for t in (memory.keys, memory.values)}
    return sum(t.untyped_storage().nbytes() for t in stores.values())


@each_text
@pytest.mark.parametrize(
    ("budget", "lefts", "prompt"),
    [
        (33, (0, 0), None),
        (0.4, (0, 7), 90),
        (24, (50, 3), 90),
        (0.3, (0, 0), 90),
        (0.3, (0, 78), 90),  # so short that some policies leave it as it is
    ],
)
def test_outputs_are_those_of_attention_over_what_should_be_kept(
    name, budget, lefts, prompt, text_of
):
    text = text_of(name, budget, lefts=lefts, prompt=prompt, T=130)
    for size in (40, 50):
        text.read(size)
        heads = {tuple(columns) for row in text.kept for columns in row}
        assert len(heads) > 1 or name == "latest"  # each head keeps others
    for size in (1, 1, 1, 5, 1, 1):
        text.read(size)


@each_text
def test_a_prompt_in_chunks_takes_no_more_than_the_budget_and_a_chunk(name, text_of):
    text = text_of(name, 20, T=200)
    for _ in range(5):
        text.read(40)
    assert text.widest == 60
    # in both of keys and values: 2 rows, 2 heads, 20 tokens of 16 numbers
    assert bytes_of(text.memory) == 2 * 2 * 2 * 20 * 16 * 4


@pytest.mark.parametrize("name", ["h2o", "h2o_average", "latest"])
def test_steps_never_hold_more_than_the_budget(name, text_of):
    text = text_of(name, 40, T=150)
    text.read(60)
    for _ in range(80):
        text.read(1)
        assert bytes_of(text.memory) <= 2 * 2 * 2 * 40 * 16 * 4
    assert text.widest <= 60


@each_text
def test_rows_can_change_places(name, text_of):
    text = text_of(name, 25, T=100, lefts=(0, 9), prompt=60)
    text.read(60)
    order = torch.tensor([1, 0, 1])
    text.memory.batch_select_indices(order)
    other = text.policy.__dict__.get("received", {})
    moved = {
        (b, h, c): v
        for b, o in enumerate(order.tolist())
        for (o2, h, c), v in other.items()
        if o2 == o
    }
    if moved:
        text.policy.received = moved
    for tensor in ("q", "k", "v", "plain", "positions"):
        setattr(text, tensor, getattr(text, tensor)[order])
    text.kept = [[list(columns) for columns in text.kept[o]] for o in order.tolist()]
    text.lefts = tuple(text.lefts[o] for o in order.tolist())
    for size in (1, 1, 4, 1):
        text.read(size)


@each
def test_a_budget_beyond_the_text_is_the_plain_cache_bitwise(name, full_model):
    ids = torch.randint(10, 1000, (2, 70))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    kwargs = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    plain = full_model.generate(ids, **QUIET, **kwargs)
    ours = full_model.generate(ids, **QUIET, **kwargs, cache_implementation=named(name, 10_000))
    assert torch.equal(torch.stack(ours.logits), torch.stack(plain.logits))
    for one, other in zip(ours.past_key_values.layers, plain.past_key_values.layers):
        assert torch.equal(one.keys, other.keys)
    assert full_model.model.decode_steps.recording is not None


@each
def test_recorded_steps_do_what_others_do(name, full_model):
    slow = bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attention="full", dtype=torch.float32, fuse=False
    ).eval()
    ids = torch.randint(10, 1000, (2, 70))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    settings = {**QUIET, "max_new_tokens": 40, "return_dict_in_generate": True}
    found = [
        model.generate(ids, attention_mask=mask, **settings, cache_implementation=named(name, 0.4))
        for model in (full_model, slow)
    ]
    recording = full_model.model.decode_steps.recording
    assert recording is not None
    memory = found[0].past_key_values.layers[0]
    assert recording._step.addresses[0][0] is memory.key_store
    assert torch.equal(*(output.sequences for output in found))
    for one, other in zip(*(output.past_key_values.layers for output in found)):
        assert one.padding.tolist() == other.padding.tolist()
        empty = int(one.padding[0])
        torch.testing.assert_close(one.keys[0, :, empty:], other.keys[0, :, empty:])
        torch.testing.assert_close(one.values[1], other.values[1])
        if name == "h2o":
            held = one.held
            torch.testing.assert_close(
                one.mass[1, :, :held], other.mass[1, :, :held], rtol=1e-4, atol=1e-4
            )
    # the row without padding, and the other one, each by itself
    alone = [
        full_model.generate(
            ids[row : row + 1, start:], **settings, cache_implementation=named(name, 0.4)
        ).sequences[0, -40:]
        for row, start in ((0, 30), (1, 0))
    ]
    assert torch.equal(torch.stack(alone), found[0].sequences[:, -40:])


@each_of_prompts
def test_beams_and_chunks_go_with_it(name, full_model):
    ids = torch.randint(10, 1000, (1, 100))
    settings = {**QUIET, "max_new_tokens": 12, "return_dict_in_generate": True}
    beams = full_model.generate(ids, num_beams=2, **settings, cache_implementation=named(name, 30))
    assert beams.sequences.shape[1] == 112
    chunked = full_model.generate(
        ids, prefill_chunk_size=40, **settings, cache_implementation=named(name, 30)
    )
    held = {layer.held for layer in chunked.past_key_values.layers}
    assert held == ({30} if name in ("h2o", "latest") else {41})


@pytest.mark.parametrize("name", ["snapkv", "expected_attention", "kvzip"])
def test_chunks_that_nothing_would_be_dropped_of_are_refused(name, full_model):
    ids = torch.randint(10, 1000, (1, 200))
    settings = {
        **QUIET,
        "max_new_tokens": 2,
        "cache_implementation": {"name": name, "budget": 30},
    }
    with pytest.raises(ValueError, match=r"`prefill_chunk_size`: .*more than 64 .* got 64"):
        full_model.generate(ids, prefill_chunk_size=64, **settings)
    full_model.generate(ids, prefill_chunk_size=65, **settings)


@each_of_prompts
def test_a_conversation_goes_on(name, full_model):
    ids = torch.randint(10, 1000, (1, 90))
    settings = {**QUIET, "max_new_tokens": 5, "return_dict_in_generate": True}
    first = full_model.generate(ids, **settings, cache_implementation=named(name, 30))
    more = torch.cat([first.sequences, torch.randint(10, 1000, (1, 40))], 1)
    second = full_model.generate(more, past_key_values=first.past_key_values, **settings)
    for layer in second.past_key_values.layers:
        assert layer.get_seq_length() == 90 + 5 + 40 + 4
        assert layer.held == (30 if name in ("h2o", "latest") else 34)


def test_what_is_taken_back_was_never_read(text_of):
    for name in ("snapkv", "expected_attention"):
        text = text_of(name, 30, T=90, prompt=60)
        text.read(60)
        text.read(5)
        text.memory.crop(-3)
        text.columns -= 3
        text.kept = [[columns[:-3] for columns in row] for row in text.kept]
        text.check()
        for size in (1, 2, 1):
            text.read(size)
        with pytest.raises(RuntimeError, match="it has dropped some 6 tokens ago"):
            text.memory.crop(-7)


@pytest.mark.parametrize("name", ["h2o", "latest"])
def test_a_memory_that_goes_on_dropping_takes_nothing_back(name, text_of, full_model):
    text = text_of(name, 30, T=90)
    text.read(60)
    text.memory.crop(0)
    with pytest.raises(RuntimeError, match="cannot take back 1 of the latest ones"):
        text.memory.crop(-1)


def test_assisted_decoding_goes_with_what_compresses_prompts_only(full_model):
    assistant = bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attention="full", dtype=torch.float32
    ).eval()
    ids = torch.randint(10, 1000, (1, 90))
    told = {"return_dict_in_generate": True, "output_logits": True}
    plain = full_model.generate(ids, **QUIET, **told, cache_implementation=named("snapkv", 40))
    assisted = full_model.generate(
        ids, **QUIET, assistant_model=assistant, cache_implementation=named("snapkv", 40)
    )
    new, other = plain.sequences[0, 90:], assisted[0, 90:]
    same = int((new[: len(other)] == other[: len(new)]).int().cumprod(0).sum())
    if same < len(new):
        # codes of activations round otherwise, where both were nearly as good; and tokens that an
        # assistant proposes behind a prompt come in one call with it, and see all of it
        whole = full_model(assisted[:, : 90 + same], use_cache=False).logits[:, -1]
        assert any(
            logits.max() - logits[0, other[same]] < 2 * logits.std()
            for logits in (plain.logits[same], whole)
        )


@each_of_prompts
def test_a_file_has_no_word_for_it(name, full_model, tmp_path):
    output = full_model.generate(
        torch.randint(10, 1000, (1, 50)), **QUIET, return_dict_in_generate=True,
        cache_implementation=named(name, 30),
    )  # fmt: skip
    with pytest.raises(ValueError, match="`cache`: layer 0: expected tokens in a layer that keeps"):
        bt.save_cache(full_model, output.past_key_values, tmp_path / "cache")


@each
def test_padding_elsewhere_is_refused(name, full_model):
    ids = torch.randint(10, 1000, (2, 50))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    bt_cache = parse_memory(named(name, 30))
    assert bt_cache.evicts
    with pytest.raises(ValueError, match="takes padding to the left"):
        full_model.generate(ids, attention_mask=mask, **QUIET, cache_implementation=named(name, 30))
    mask[0] = 1
    mask[0, 10:12] = 0
    with pytest.raises(ValueError, match="takes padding to the left"):
        full_model.generate(ids, attention_mask=mask, **QUIET, cache_implementation=named(name, 30))


@each_text
def test_nothing_is_left_after_a_reset(name, text_of):
    text = text_of(name, 30, T=90, lefts=(0, 4))
    text.read(60)
    text.memory.reset()
    fresh = text_of(name, 30, T=90, lefts=(3, 0))
    fresh.memory = text.memory
    fresh.read(60)
    fresh.read(1)


@pytest.mark.parametrize("name", ["pages", "h2o"])
def test_a_compiled_call_takes_no_mask_and_says_so(name):
    """Nobody can look at the values of a mask while a graph is traced: it stays a matrix."""
    inputs = LayerInputs(None, None, parse_memory(name).memory(), is_cached=True)
    tokens = Tokens(matrix=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    context = AttentionContext(layer=0, scale=1.0, tokens=tokens, inputs=inputs)
    q, k, v = (torch.randn(1, 5, 2, 16) for _ in range(3))
    with pytest.raises(ValueError, match="takes padding to the left of a row and nothing else"):
        Full()(q, k, v, context)
    compiled = torch.compile(lambda q: Full()(q, k, v, context), backend="eager")
    with pytest.raises(ValueError, match=r"while torch\.compile traces"):
        compiled(q)
    torch.compiler.reset()
