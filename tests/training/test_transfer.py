"""Layers of another attention learn from those that they replace, each from its own inputs."""

from __future__ import annotations

import json

import pytest
import torch

import bitnet_triton as bt
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.training import evaluation, trainee
from bitnet_triton.training.adapt import adapt
from bitnet_triton.training.jobs import Adaptation
from bitnet_triton.training.packing import PackingCollator
from bitnet_triton.training.transfer import layer_error, transfer

HEDGEHOG = {"mode": "linear", "form": "plain", "feature_map": "hedgehog"}
FORMS = {"gated": {"mode": "linear"}, "hedgehog": HEDGEHOG}


@pytest.fixture(scope="module")
def masters(packed_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masters") / "model"
    convert_checkpoint(packed_folder, folder, to="masters", dtype=torch.float32)
    return folder


def load(folder, attention):
    model = bt.BitNetForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    return bt.set_attention(model, attention)


def second_layer(other):
    layers = [{"mode": "full"}, other]
    return {"prefill": layers, "decode": layers}


@pytest.fixture
def documents():
    ids = torch.randint(3, 90, (6, 40)).tolist()
    return [{"input_ids": row, "labels": row, "prompt_len": 10} for row in ids]


@pytest.fixture
def batch(documents):
    batch = PackingCollator(tell_prompts=True)([documents])
    batch.pop("labels")
    return batch


def test_a_copy_of_the_teacher_has_no_error(masters, batch):
    student = load(masters, second_layer({"mode": "linear"}))
    teacher = load(masters, second_layer({"mode": "linear"}))
    assert layer_error(student, teacher, batch) == 0


def test_error_is_that_of_the_layer_for_the_inputs_of_the_teacher(masters, batch):
    student = load(
        masters, {"prefill": [{"mode": "linear"}] * 2, "decode": [{"mode": "linear"}] * 2}
    )
    teacher = load(masters, "full")
    wanted = []
    for layer in teacher.model.layers:
        layer.self_attn.register_forward_hook(lambda *args: wanted.append(args[-1][0]))
    for layer in student.model.layers:  # then attention gives 0, whatever it gets
        torch.nn.init.zeros_(layer.self_attn.linear.norm.weight)
    error = layer_error(student, teacher, batch)
    expected = [w.square().sum() / (w - w.mean(1, keepdim=True)).square().sum() for w in wanted]
    torch.testing.assert_close(error, torch.stack(expected).mean(), rtol=1e-5, atol=0)
    assert not torch.equal(wanted[0], wanted[1])


@pytest.mark.parametrize("form", FORMS)
def test_what_a_mode_brings_learns_and_nothing_else(form, masters, documents, batch):
    student, teacher = load(masters, FORMS[form]), load(masters, "full")
    before = {name: p.clone() for name, p in student.named_parameters()}
    start = layer_error(student, teacher, batch)
    told = []
    errors = transfer(
        student, teacher, documents * 8, row=120, rate=1e-2, progress=lambda *at: told.append(at)
    )
    assert told == [(i + 1, 16, error) for i, error in enumerate(errors)]
    assert layer_error(student, teacher, batch) < 0.9 * start
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".self_attn.linear." in name for name in changed)
    assert all(p.grad is None for p in student.parameters())
    assert not any(layer.self_attn._forward_hooks for layer in student.model.layers)


def test_a_model_without_such_modes_is_refused(masters, documents):
    model = load(masters, "full")
    with pytest.raises(ValueError, match="`attention`: expected a mode with weights of its own"):
        transfer(model, model, documents, row=120, rate=1e-3)


def test_adapt_transfers_first_and_only_once(packed_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_TEXT_TOKENS", 256)
    job = Adaptation(
        output=str(tmp_path / "run"), model=packed_folder, attention="linear", lora=False,
        transfer=2, tokens=700, length=100, row=200, eval_length=64, eval_samples=1, eval_tasks=[],
        question="prompt",
    )  # fmt: skip
    told = []
    report = adapt(job, lambda what, done, total, loss: told.append(what))
    errors = report["training"]["transfer"]
    assert told.count("transfer") == len(errors)
    assert told.index("transfer") < told.index("train")
    run = tmp_path / "run"
    assert json.loads((run / "transferred.json").read_text()) == errors
    model = bt.BitNetForCausalLM.from_pretrained(run / "model")
    assert {mode.name for mode in model.attention_plan} == {"linear"}
    # a run that was killed behind it does not do it again, and trains the same
    (run / "training.json").unlink()
    (run / "report.json").unlink()
    monkeypatch.setattr(trainee, "transfer", None)
    again = adapt(job)
    for name in ("transfer", "loss_before", "loss_after"):
        assert again["training"][name] == report["training"][name]
