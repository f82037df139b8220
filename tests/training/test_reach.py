"""What heads with a short reach do is where the convolution of a linear layer starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bitnet_triton as bt
from bitnet_triton.training.packing import PackingCollator
from bitnet_triton.training.reach import begin_as
from bitnet_triton.training.transfer import layer_error

FORMS = [{"mode": "linear"}, {"mode": "linear", "form": "kda"}]


@pytest.fixture
def config():
    return bt.BitNetConfig(
        vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip


def twins(config, former, new):
    """Return a model that attends by ``former``, and one with its weights that does by ``new``."""
    teacher = bt.set_attention(bt.BitNetForCausalLM(config).float(), former)
    student = bt.BitNetForCausalLM(config).float()
    student.load_state_dict(teacher.state_dict())
    return bt.set_attention(student, new), teacher


def row(*lengths):
    documents = [torch.randint(3, 90, (length,)).tolist() for length in lengths]
    packed = [{"input_ids": ids, "labels": ids, "prompt_len": len(ids)} for ids in documents]
    batch = PackingCollator(tell_prompts=True)([packed])
    batch.pop("labels")
    return batch


@pytest.fixture
def batch():
    """Short documents, so that sums that went beyond their first token would be seen."""
    return row(*range(9, 69, 5))


@pytest.mark.parametrize("form", FORMS, ids=["gated_delta", "kda"])
def test_a_short_window_comes_over_without_training(form, config, batch):
    """Random queries and keys weigh nearly alike: each head is a mean of three tokens."""
    student, teacher = twins(config, {"mode": "sliding", "window": 3}, form)
    before = layer_error(student, teacher, batch)
    shares = begin_as(student, teacher, batch)
    assert torch.tensor(shares).shape == (2, 2)
    assert torch.tensor(shares).min() > 0.9
    after = layer_error(student, teacher, batch)
    assert after < 0.3 < 1 < before


def test_taps_are_the_weights_of_the_window(config, batch):
    student, teacher = twins(config, {"mode": "sliding", "window": 2}, FORMS[0])
    begin_as(student, teacher, batch)
    H, Hk, D = 4, 2, 32
    for layer in student.model.layers:
        taps = layer.self_attn.linear.convolution.weight[(H + Hk) * D :].view(Hk, D, 4)
        assert torch.equal(taps, taps[:, :1].expand_as(taps))  # alike for all channels of a head
        shares = taps[:, 0] / taps[:, 0].sum(-1, keepdim=True)
        wanted = torch.tensor([0.0, 0.0, 0.5, 0.5])
        torch.testing.assert_close(shares, wanted.expand(Hk, 4), rtol=0, atol=0.1)


def test_heads_that_look_far_keep_their_start_and_open_as_far_as_they_are_large(config):
    batch = row(450)
    student, teacher = twins(config, "full", FORMS[0])
    outputs = []
    with torch.no_grad():
        for number, layer in enumerate(teacher.model.layers):
            layer.self_attn.v_proj.weight.mul_(3.0 + number)
            layer.self_attn.q_proj.weight.mul_(100.0)  # each token looks at few others
            layer.self_attn.attn_sub_norm.register_forward_pre_hook(
                lambda _, args: outputs.append(args[0])
            )
    began = [layer.self_attn.linear for layer in student.model.layers]
    former = [(parts.convolution.weight.clone(), parts.gates.decay_bias.clone()) for parts in began]
    shares = begin_as(student, teacher, batch)
    assert torch.tensor(shares).max() < 0.5
    for parts, (taps, bias), out in zip(began, former, outputs, strict=True):
        assert torch.equal(parts.convolution.weight, taps)
        assert torch.equal(parts.gates.decay_bias, bias)
        size = out[0].view(-1, 4, 32).square().mean(dim=(0, 2)).sqrt()
        opened = F.silu(parts.gates.gate_bias).view(4, 32)
        torch.testing.assert_close(opened, size[:, None].expand(4, 32), rtol=1e-4, atol=1e-5)


def test_heads_that_give_nothing_and_layers_without_a_convolution(config, batch):
    student, teacher = twins(config, {"mode": "sliding", "window": 2}, FORMS[0])
    torch.nn.init.zeros_(teacher.model.layers[0].self_attn.v_proj.weight)
    shares = begin_as(student, teacher, batch)
    assert shares[0] == [0.0, 0.0]
    assert student.model.layers[0].self_attn.linear.gates.gate_bias.abs().max() < 1e-6
    assert all(p.isfinite().all() for p in student.parameters())
    student, teacher = twins(config, "full", {"mode": "linear", "convolution": 1})
    assert begin_as(student, teacher, batch) == [[], []]
    plain, teacher = twins(config, "full", {"mode": "linear", "form": "plain"})
    assert begin_as(plain, teacher, batch) == []


def test_layers_that_were_converted_before_and_heads_without_queries(config, batch):
    """What such a layer has learned stays; of zeros nothing becomes infinite."""
    plan = {"prefill": ["full", "linear"], "decode": ["full", "linear"]}
    student, teacher = twins(config, plan, FORMS[0])
    learned = torch.randn_like(teacher.model.layers[1].self_attn.linear.gates.gate_bias)
    for model in (student, teacher):
        gates = model.model.layers[1].self_attn.linear.gates
        gates.gate_bias.data.copy_(learned)
    assert len(begin_as(student, teacher, batch)) == 1
    assert torch.equal(student.model.layers[1].self_attn.linear.gates.gate_bias, learned)
    student, teacher = twins(config, {"mode": "sliding", "window": 3}, FORMS[0])
    for model in (student, teacher):
        torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
    begin_as(student, teacher, batch)
    assert all(p.isfinite().all() for p in student.parameters())
    assert layer_error(student, teacher, batch).isfinite()
