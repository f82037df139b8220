"""The output head: the same logits, by a plain matrix product or from an int8 weight."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

import bitnet_triton as bt
from bitnet_triton.kernels import Int8Weight, int8_linear
from bitnet_triton.nn import Int8Head, OutputHead, quantize_head, unquantize_head, use_output_head

TOKENS = torch.arange(3, 13).view(2, 5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8), (2, 0, 8)], ids=str)
def test_gives_the_logits_and_gradients_of_nn_linear(shape, bias):
    linear = nn.Linear(8, 12, bias=bias)
    head = OutputHead.from_linear(linear)
    x, y = (torch.randn(shape).requires_grad_() for _ in range(2))
    y.data = x.data.clone()
    expected, logits = linear(x), head(y)
    torch.testing.assert_close(logits, expected)
    expected.square().sum().backward()
    weight_grad = linear.weight.grad.clone()
    linear.weight.grad = None
    logits.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(head.weight.grad, weight_grad)


def test_a_slice_of_a_sequence_becomes_a_matrix(monkeypatch):
    head = OutputHead(8, 12, bias=False)
    seen = []
    linear = torch.nn.functional.linear

    def record(x, *rest):
        seen.append((x.shape, x.stride()))
        return linear(x, *rest)

    monkeypatch.setattr("bitnet_triton.nn.head.F.linear", record)
    assert head(torch.randn(1, 6, 8)[:, -1:]).shape == (1, 1, 12)
    ((shape, _),) = seen
    assert shape == (1, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_replaces_the_head_in_place_and_keeps_it_tied(tied):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(5).unsqueeze(0)
    before, names = model(tokens).logits, list(model.state_dict())
    use_output_head(model)
    assert type(model.lm_head) is OutputHead
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(tokens).logits, before)


def test_a_model_without_a_head_stays_as_it_is():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaModel(config)
    kinds = [type(module) for module in model.modules()]
    use_output_head(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.fixture
def model():
    """A small model with tied embeddings whose logits are far apart."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    use_output_head(model)
    return model


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def hidden_states(model):
    with torch.no_grad():
        return model.model(TOKENS).last_hidden_state


def test_a_quantised_head_multiplies_by_its_int8_weight(model):
    weight = model.lm_head.weight
    assert quantize_head(model) is model
    assert type(model.lm_head) is Int8Head
    expected = int8_linear(hidden_states(model), Int8Weight.from_dense(weight))
    assert torch.equal(logits(model), expected)
    # twice changes nothing, and the tie to the embedding stays
    assert torch.equal(logits(quantize_head(model)), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight


def test_unquantising_gives_the_head_back(model):
    plain = LlamaForCausalLM(model.config).eval()
    for each, kind in ((model, OutputHead), (plain, nn.Linear)):
        expected, attributes = logits(each), vars(each.lm_head).keys()
        assert not torch.equal(logits(quantize_head(each)), expected)
        assert unquantize_head(unquantize_head(each)) is each
        assert type(each.lm_head) is kind
        assert vars(each.lm_head).keys() == attributes
        assert torch.equal(logits(each), expected)


def test_what_is_saved_is_the_dense_weight(model, tmp_path):
    expected = logits(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_head(model).save_pretrained(tmp_path)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(again.lm_head) is nn.Linear
    torch.testing.assert_close(logits(again), expected)


def test_gradients_come_from_the_dense_weight(model):
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    again = quantize_head(model)(TOKENS, labels=TOKENS).loss
    again.backward()
    assert torch.equal(again, loss)
    assert torch.equal(model.lm_head.weight.grad, expected)


def double_weight(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def replace_weight(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))


def load_weight(model):
    state = {name: tensor.flip(0) for name, tensor in model.state_dict().items() if "lm" in name}
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    "change", [double_weight, replace_weight, load_weight, LlamaForCausalLM.bfloat16]
)
def test_a_weight_that_changes_is_quantised_anew(model, change):
    before = logits(quantize_head(model))
    change(model)
    after = logits(model)
    assert not torch.equal(after.float(), before)
    expected = int8_linear(hidden_states(model), Int8Weight.from_dense(model.lm_head.weight))
    assert torch.equal(after, expected)


def test_a_weight_that_stays_is_quantised_once(model, monkeypatch):
    quantize_head(model)
    monkeypatch.setattr(Int8Weight, "from_dense", None)
    assert torch.equal(logits(model), logits(model))


def test_a_copy_is_independent(model):
    expected = logits(quantize_head(model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not logits(model).any()
    assert torch.equal(logits(twin), expected)


@pytest.mark.parametrize("quantised", [False, True])
def test_the_largest_logits_are_those_of_the_forward(model, quantised):
    if quantised:
        quantize_head(model)
    hidden = hidden_states(model)
    for k in (1, 4):
        values, tokens = model.lm_head.topk(hidden, k)
        expected = logits(model).topk(k)
        assert torch.equal(values, expected.values)
        assert torch.equal(tokens, expected.indices)
        assert not values.requires_grad


def test_hooks_on_the_head_still_run(model):
    seen = []
    model.lm_head.register_forward_hook(lambda *args: seen.append(args))
    logits(quantize_head(model))
    assert len(seen) == 1


def test_a_compiled_head_is_one_graph(model):
    head = quantize_head(model).lm_head
    hidden = hidden_states(model)
    with torch.no_grad():
        compiled = torch.compile(head, fullgraph=True, backend="eager")
        assert torch.equal(compiled(hidden), head(hidden))


def test_greedy_tokens_are_those_of_the_quantised_logits(model):
    quantize_head(model)
    tokens = model.generate(TOKENS[:, :3], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(logits(model, tokens)[:, 2:-1].argmax(-1), tokens[:, 3:])


def offload(model):
    model.lm_head._hf_hook = object()


def unload(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))


def adapt(model):
    model.lm_head = nn.Sequential(model.lm_head)


def spoil(model):
    model.lm_head.weight.data[3, 5] = torch.inf


@pytest.mark.parametrize(
    ("spoiling", "message"),
    [
        (offload, "accelerate moves its output head"),
        (unload, "the weight of its output head is not loaded"),
        (adapt, "expected a dense output head, got Sequential in LlamaForCausalLM"),
        (spoil, "expected finite weights"),
    ],
)
def test_a_head_that_cannot_be_quantised_is_named_and_left(model, spoiling, message):
    spoiling(model)
    kind = type(model.lm_head)
    with pytest.raises(ValueError, match=message):
        quantize_head(model)
    assert type(model.lm_head) is kind
    assert not hasattr(model.lm_head, "quantized")


def test_a_model_without_a_head_is_refused(model):
    with pytest.raises(ValueError, match="expected a dense output head, got NoneType in LlamaMo"):
        quantize_head(model.model)
    assert unquantize_head(model.model) is model.model


@pytest.fixture(scope="module")
def written():
    """Python that the embedded model never saw in training, as tokens [8, 256]."""
    tokenizer = AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    ids = tokenizer(Path(__file__).read_text(), return_tensors="pt").input_ids
    return ids[0, : 8 * 256].view(8, 256)


def effect(model, tokens):
    """Return what the int8 head does to a model.

    The mean KL divergence in nats, the share of tokens with the same best next one, and how far
    ahead in log-probability the best one was where it is another now.
    """
    exact = logits(model, tokens).float().log_softmax(-1)
    rounded = logits(quantize_head(model), tokens).float().log_softmax(-1)
    divergence = (exact.exp() * (exact - rounded)).sum(-1).mean().item()
    agrees = exact.argmax(-1) == rounded.argmax(-1)
    best, second = exact.topk(2).values.unbind(-1)
    lead = (best - second)[~agrees]
    return divergence, agrees.float().mean().item(), lead.max().item() if len(lead) else 0.0


def test_the_embedded_model_keeps_its_distribution(written):
    """The figures of docs/numerics.md, with room for other machines."""
    divergence, agreement, lead = effect(
        bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL), written
    )
    assert 0 < divergence < 3e-4
    assert agreement > 0.98
    # logits of 16 to 32 in bfloat16 are rounded to eighths
    assert lead <= 0.125
