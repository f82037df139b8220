"""Two stages: rates and decays by hand, through ``Trainer``, and on from a checkpoint."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from bitnet_triton.training import PackingCollator, TwoStages

RECIPE = TwoStages(rates=(1.0, 0.5), decays=(0.1, 0.0), warm_up=2)


class Watch(TrainerCallback):
    """Notes what the optimiser is about to use in each step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        groups = optimizer.param_groups
        self.seen.append((groups[0]["lr"], *(group["weight_decay"] for group in groups)))


def test_trainer_uses_the_rates_and_decays_of_the_notes(masters, documents, tmp_path):
    watch = Watch()
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=8, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(
        masters, arguments, PackingCollator(), documents, callbacks=[watch],
        optimizers=RECIPE.create(masters, steps=8),
    ).train()  # fmt: skip
    # peak 1, falling to 0 over all 8 steps, half of it in the first step of two of warm-up; from
    # the middle on it is what a decay from 0.5 has come to
    rates = [0.5, 7 / 8, 6 / 8, 5 / 8, 0.5 * 4 / 8, 0.5 * 3 / 8, 0.5 * 2 / 8, 0.5 / 8]
    assert [seen[0] for seen in watch.seen] == pytest.approx(rates)
    assert [seen[1] for seen in watch.seen] == [0.1] * 4 + [0.0] * 4
    assert {seen[2] for seen in watch.seen} == {0.0}


def test_it_goes_on_where_its_state_was_saved(masters):
    optimizer, scheduler = RECIPE.create(masters, steps=8)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    other, resumed = RECIPE.create(masters, steps=8)
    resumed.load_state_dict(scheduler.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for each in (scheduler, resumed):
        each.step()
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] > 0
    assert other.param_groups[0]["weight_decay"] == 0.0


def test_only_trained_matrices_decay(masters):
    masters.model.layers[0].requires_grad_(False)
    matrices, vectors = RECIPE.optimizer(masters).param_groups
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    count = len(matrices["params"]) + len(vectors["params"])
    assert count == sum(p.requires_grad for p in masters.parameters())


def test_peaks_are_those_of_the_notes():
    assert TwoStages.for_size(700_000_000) == TwoStages(rates=(1.5e-3, 1e-3))
    assert TwoStages.for_size(3_900_000_000).rates == (1.2e-3, 8e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rates": (1e-3, 0.0)}, "`rates`: expected positive numbers"),
        ({"decays": (-0.1, 0.0)}, "`decays`: expected numbers of at least 0"),
        ({"warm_up": -1}, "`warm_up`: expected at least 0 steps, got -1"),
        ({"switch": 0.0}, "`switch`: expected a share above 0 and up to 1, got 0.0"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        TwoStages(**wrong)
    with pytest.raises(ValueError, match="`steps`: expected at least 1, got 0"):
        TwoStages().create(torch.nn.Linear(2, 2), steps=0)


def test_a_training_goes_on_with_another_number_of_steps_or_a_new_scheduler():
    recipe = TwoStages(rates=(1.0, 0.5), decays=(0.0, 0.1), warm_up=0)
    layer = torch.nn.Linear(2, 2)
    optimizer, scheduler = recipe.create(layer, steps=4)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    longer = recipe.scheduler(recipe.optimizer(layer), 10)
    longer.load_state_dict(scheduler.state_dict())
    longer.optimizer.step()
    longer.step()
    assert longer.get_last_lr() == [pytest.approx(recipe.at(4, 10)[0])] * 2
    assert [g["weight_decay"] for g in longer.optimizer.param_groups] == [0.0, 0.0]


def test_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="`warm_up`: expected fewer than the 100 steps"):
        TwoStages().create(torch.nn.Linear(2, 2), steps=100)
