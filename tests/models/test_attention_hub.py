"""attn_implementation="bitnet_triton" in models of transformers that know nothing of ours."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

import bitnet_triton.models  # noqa: F401  registers the name
from bitnet_triton.attention import hub
from bitnet_triton.attention.hub import describe_mask
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.attention.plan import AttentionPlan
from bitnet_triton.attention.tokens import Tokens

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
LAYERS = ["full_attention", "sliding_attention", "sliding_attention"]
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED)),
    "mistral": (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=4)),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config(**GROUPED, use_sliding_window=True, sliding_window=4, layer_types=LAYERS),
    ),
    # scores with a bound, another scale, and windows in turns
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**GROUPED, sliding_window=4, attn_logit_softcapping=2.0, layer_types=LAYERS),
    ),
    # a learnable sink in every head, and windows in turns
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig(
            **GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
            layer_types=LAYERS, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
    ),
}  # fmt: skip
T = 14


@pytest.fixture(params=FAMILIES)
def model(request):
    family, config = FAMILIES[request.param]
    model = family(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 1.0 if "embed" in name else 0.2)
    return model


@pytest.fixture
def padded():
    ids = torch.randint(3, 96, (2, T))
    ids[0, :4] = 0
    return ids, (ids != 0).long()


@pytest.fixture
def seen(monkeypatch):
    """What the attention function gets as masks."""
    masks = []
    attend = Full.__call__

    def look(self, q, k, v, context):
        masks.append(context.tokens)
        return attend(self, q, k, v, context)

    monkeypatch.setattr(Full, "__call__", look)
    return masks


def both(model, call):
    """Return what ``call`` gives with eager attention of transformers, and with ours."""
    results = []
    for name in ("eager", "bitnet_triton"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(call(model))
    return results


def test_logits_are_those_of_transformers(model, padded, seen, error):
    ids, mask = padded
    theirs, ours = both(model, lambda m: m(ids, attention_mask=mask).logits)
    assert error(ours[mask.bool()], theirs[mask.bool()]) <= 1e-5
    assert len(seen) == 3
    assert all(tokens.matrix is None for tokens in seen)
    windows = {tokens.window for tokens in seen}
    assert windows == ({None} if model.config.model_type == "llama" else {None, 4} & windows)


def test_padding_on_the_right_is_described_too(model, padded, seen, error):
    ids = padded[0].flip(1)
    mask = (ids != 0).long()
    theirs, ours = both(model, lambda m: m(ids, attention_mask=mask).logits)
    assert error(ours[mask.bool()], theirs[mask.bool()]) <= 1e-5
    assert all(tokens.matrix is None for tokens in seen)


def test_packed_sequences_are_described(model, seen, error):
    ids = torch.randint(3, 96, (2, T))
    places = torch.cat([torch.arange(5), torch.arange(7), torch.arange(2)]).expand(2, T)
    call = lambda m: m(ids, position_ids=places, use_cache=False).logits  # noqa: E731
    theirs, ours = both(model, call)
    if model.config.model_type == "gpt_oss":  # whose masks transformers tells no positions
        texts = ids.split([5, 7, 2], 1)
        theirs = torch.cat([both(model, lambda m, x=x: m(x).logits)[0] for x in texts], 1)
        assert error(ours, theirs) <= 1e-5
        return
    assert error(ours, theirs) <= 1e-5
    expected = [0, 5, 12, 14, 19, 26, 28]
    assert all(tokens.cu_seqlens.tolist() == expected for tokens in seen)


def test_padding_between_tokens_becomes_a_matrix(model, padded, seen, error):
    ids, mask = padded
    mask[1, 5] = 0
    theirs, ours = both(model, lambda m: m(ids, attention_mask=mask).logits)
    assert error(ours[:, 6:], theirs[:, 6:]) <= 1e-5
    assert all(tokens.matrix.shape == (2, 1, T, T) for tokens in seen)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_that_of_transformers(cache, model, padded, seen, draw_clear, token_distance):
    mask = padded[1]
    kwargs = {
        "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None,
        "cache_implementation": cache,
    }  # fmt: skip

    def distance(ids):
        output = model.generate(ids, **kwargs, output_logits=True, return_dict_in_generate=True)
        return token_distance(torch.stack(output.logits, 1), output.sequences[:, T:])

    model.set_attn_implementation("eager")
    ids = draw_clear(lambda: torch.randint(3, 96, (2, T)) * mask, distance)
    theirs, ours = both(model, lambda m: m.generate(ids, **kwargs))
    assert torch.equal(theirs, ours)
    assert all(tokens.matrix is None for tokens in seen)


def test_gradients_are_those_of_transformers(model, padded, error):
    ids, mask = padded
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100  # or padding would have to tell the first token
    grads = []
    for name in ("eager", "bitnet_triton"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert error(grads[1], grads[0]) <= 1e-4


def test_autocast_trains(model, padded):
    ids, mask = padded
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 4] = -100
    losses = []
    for name in ("eager", "bitnet_triton"):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(ids, attention_mask=mask, labels=labels).loss)
    losses[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


@pytest.mark.parametrize("cache", [False, True], ids=["forward", "static cache"])
def test_a_compiled_model_has_no_graph_break(cache, model, error):
    model.set_attn_implementation("bitnet_triton")
    ids = torch.randint(3, 96, (2, T))
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    kwargs = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        if cache:
            kwargs["cache_implementation"] = "static"
            expected = model.generate(ids, **kwargs)
            prepare = model.forward
            model.forward = compiled
            assert torch.equal(model.generate(ids, **kwargs), expected)
            model.forward = prepare
        else:
            expected = model(ids, use_cache=False).logits
            assert error(compiled(ids, use_cache=False).logits, expected) <= 1e-5
    torch.compiler.reset()


def test_trainer_trains(model, tmp_path):
    model.set_attn_implementation("bitnet_triton")
    ids = torch.randint(3, 96, (8, T))
    data = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids
    ]
    arguments = TrainingArguments(
        tmp_path, max_steps=12, learning_rate=3e-3, logging_steps=1, use_cpu=True,
        per_device_train_batch_size=8, report_to=[], save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_an_encoder_sees_both_sides(error):
    model = BertModel(BertConfig(**SIZES)).eval()
    ids = torch.randint(3, 96, (2, T))
    mask = torch.ones_like(ids)
    theirs, ours = both(model, lambda m: m(ids, attention_mask=mask).last_hidden_state)
    assert error(ours, theirs) <= 1e-5
    mask[0, 9:] = 0
    theirs, ours = both(model, lambda m: m(ids, attention_mask=mask).last_hidden_state)
    assert error(ours[mask.bool()], theirs[mask.bool()]) <= 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sinks_count_where_a_matrix_or_dropout_needs_pytorch(dropout, error):
    family, config = FAMILIES["gpt_oss"]
    model = family(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    ids = torch.randint(3, 96, (2, T))
    mask = torch.ones_like(ids)
    mask[1, 5] = dropout > 0  # a hole is what only a matrix says
    results = []
    for name in ("eager", "bitnet_triton"):
        model.set_attn_implementation(name)
        torch.manual_seed(0)
        results.append(model(ids, attention_mask=mask).logits)
    assert error(results[1][:, 6:], results[0][:, 6:]) <= 1e-5


def test_sinks_of_a_model_with_a_plan_are_refused():
    q, module = torch.randn(1, 2, 3, 16), torch.nn.Identity()
    module.attention_plan = AttentionPlan(prefill=(Full(),), decode=(Full(),))
    with pytest.raises(ValueError, match="`s_aux`: a model with an attention plan"):
        hub.attend(module, q, q, q, None, s_aux=torch.zeros(2))


def test_an_unknown_mask_function_becomes_a_matrix():
    def every_second(b, h, i, j):
        return (j <= i) & (j % 2 == 0)

    matrix = describe_mask(2, 5, 5, mask_function=every_second)
    assert torch.equal(matrix[1, 0, 4], torch.tensor([True, False, True, False, True]))
    assert isinstance(describe_mask(2, 5, 5), Tokens)
    # a model that wants to look into the matrix gets it
    assert describe_mask(2, 5, 5, allow_is_causal_skip=False).shape == (2, 1, 5, 5)
