"""The lines of a log say what the ternary weights did, step by step."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from bitnet_triton.nn import BitLinear
from bitnet_triton.training import PackingCollator, TernaryMonitor


class Weights(TrainerCallback):
    """Copies all ternary masters after every step."""

    def __init__(self, model):
        self.copies = [self.copy(model)]

    def copy(self, model):
        layers = [module for module in model.modules() if isinstance(module, BitLinear)]
        return [layer.weight.detach().double() for layer in layers]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.copies.append(self.copy(model))


def codes(weights):
    scales = [weight.abs().mean() for weight in weights]
    rounded = [(w / s).round().clamp(-1, 1) for w, s in zip(weights, scales)]
    return torch.cat([code.flatten() for code in rounded]), scales, rounded


def test_shares_flips_and_errors_are_those_of_the_weights(masters, documents, tmp_path):
    weights = Weights(masters)
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=4, per_device_train_batch_size=4, logging_steps=2,
        learning_rate=3e-3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        include_num_input_tokens_seen="all",
    )  # fmt: skip
    trainer = Trainer(
        masters, arguments, PackingCollator(), documents, callbacks=[weights, TernaryMonitor()]
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        before, after = (weights.copies[line["step"] - back] for back in (1, 0))
        found, scales, rounded = codes(after)
        flips = (codes(before)[0] != found).double().mean().item()
        assert line["flips"] == pytest.approx(flips)
        assert flips > 0
        for name, code in (("share_minus", -1), ("share_zero", 0), ("share_plus", 1)):
            assert line[name] == pytest.approx((found == code).double().mean().item())
        lost = sum((w - c * s).square().sum() for w, s, c in zip(after, scales, rounded))
        norm = sum(w.square().sum() for w in after)
        assert line["quantization_error"] == pytest.approx((lost / norm).sqrt().item(), rel=1e-5)
        assert line["tokens_per_second"] > 0
        assert 0.05 < line["memory_gb"] < 100


def test_a_model_without_trained_ternary_weights_has_no_shares(masters, documents, tmp_path):
    masters.model.layers.requires_grad_(False)
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=1, logging_steps=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    monitor = TernaryMonitor()
    trainer = Trainer(masters, arguments, PackingCollator(), documents, callbacks=[monitor])
    trainer.train()
    assert "memory_gb" in trainer.state.log_history[0]
    assert not {"flips", "tokens_per_second"} & set(trainer.state.log_history[0])


def test_attached_it_speaks_before_those_that_report(masters, documents, tmp_path):
    class Reporter(TrainerCallback):  # as those of wandb and TensorBoard: called with the line once
        seen: ClassVar[list] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=2, logging_steps=1, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(masters, arguments, PackingCollator(), documents, callbacks=[Reporter()])
    TernaryMonitor().attach(trainer)
    trainer.train()
    first, second = (line for line in Reporter.seen if "loss" in line)
    assert {"share_zero", "flips", "quantization_error", "memory_gb"} <= first.keys()
    assert first["share_zero"] != second["share_zero"]


def test_lines_that_no_step_announces_have_all_but_flips(masters, documents, tmp_path):
    weights = Weights(masters)
    arguments = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True,
        logging_strategy="epoch", report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        masters, arguments, PackingCollator(), documents, callbacks=[weights, TernaryMonitor()]
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        found, _, _ = codes(weights.copies[line["step"]])
        assert line["share_zero"] == pytest.approx((found == 0).double().mean().item())
        assert "quantization_error" in line
        assert "flips" not in line
