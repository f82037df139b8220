"""LossTrainer: what Trainer loses and learns, and logits wherever somebody reads them."""

import functools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bitnet_triton.training import LossTrainer, PackingCollator

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def trainer_of(kind, model, documents, folder, **kwargs):
    settings = {
        name: kwargs.pop(name) for name in ("label_smoothing_factor",) if name in kwargs
    }  # fmt: skip
    arguments = TrainingArguments(
        str(folder), max_steps=3, logging_steps=1, learning_rate=2e-3, use_cpu=True, report_to=[],
        per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True,
        save_strategy="no", **settings,
    )  # fmt: skip
    return kind(
        model, arguments, PackingCollator(), train_dataset=documents, eval_dataset=documents[:6],
        **kwargs,
    )  # fmt: skip


@pytest.fixture
def calls(masters, monkeypatch):
    """Return a list that gets, for each call of the model, whether it had logits."""
    found, forward = [], type(masters).forward

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        found.append(outputs.logits is not None)
        return outputs

    monkeypatch.setattr(type(masters), "forward", watched)
    return found


@pytest.mark.parametrize("adapters", [False, True])
def test_loses_and_learns_what_trainer_does(adapters, masters, documents, tmp_path, calls):
    def wrapped():
        if not adapters:
            return masters
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        return peft.get_peft_model(masters, peft.LoraConfig(target_modules="all-linear"))

    model, results = wrapped(), {}
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind in (Trainer, LossTrainer):
        model.load_state_dict(start)
        calls.clear()
        trainer = trainer_of(kind, model, documents, tmp_path)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        results[kind] = [*losses, trainer.evaluate()["eval_loss"]]
        assert set(calls) == {kind is Trainer}
    assert len(set(results[Trainer])) == 4
    assert results[LossTrainer] == pytest.approx(results[Trainer], rel=1e-4)


def test_logits_are_there_for_metrics(masters, documents, tmp_path, calls):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"finite": float(np.isfinite(prediction.predictions).all())}

    trainer = trainer_of(LossTrainer, masters, documents, tmp_path, compute_metrics=metrics)
    assert trainer.evaluate()["eval_finite"] == 1
    assert all(calls)
    assert seen[0].shape[-1] == 64
    calls.clear()
    trainer.train()
    assert not any(calls)


def test_logits_are_there_for_losses_that_are_made_of_them(masters, documents, tmp_path, calls):
    def own(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean()

    for kwargs in ({"label_smoothing_factor": 0.1}, {"compute_loss_func": own}):
        calls.clear()
        trainer = trainer_of(LossTrainer, masters, documents, tmp_path, **kwargs)
        trainer.train()
        assert calls
        assert all(calls)


class OfLogits(LossTrainer):
    """The most frequent subclass: labels taken out, a loss of its own made of logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: x for name, x in inputs.items() if name != "labels"})
        loss = outputs.logits.float().square().mean()
        return (loss, outputs) if return_outputs else loss


class OfOutputs(LossTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + outputs.logits.float().square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("kind", [OfLogits, OfOutputs])
def test_subclasses_get_logits_in_steps_and_in_evaluation(
    kind, masters, documents, tmp_path, calls
):
    trainer = trainer_of(kind, masters, documents, tmp_path)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert all(calls)


def test_subclasses_that_say_so_evaluate_without(masters, documents, tmp_path, calls):
    class Plain(LossTrainer):
        evaluates_by_loss = True

        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    trainer_of(Plain, masters, documents, tmp_path).evaluate()
    assert calls
    assert not any(calls)


def test_a_model_that_does_not_skip_is_called_as_ever(documents, tmp_path, monkeypatch):
    seen, forward = [], LlamaForCausalLM.forward

    @functools.wraps(forward)
    def watched(self, *args, **kwargs):
        seen.extend(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    trainer_of(LossTrainer, LlamaForCausalLM(LlamaConfig(**SIZES)), documents, tmp_path).train()
    assert "labels" in seen
    assert "skip_logits" not in seen
