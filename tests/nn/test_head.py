"""The output head: the same logits, by a plain matrix product."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from bitnet_triton.nn import OutputHead, use_output_head


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
