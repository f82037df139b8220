"""The b1.58 recipe: two stages of learning rate and weight decay, as PyTorch has optimisers.

"The Era of 1-bit LLMs: Training Tips, Code and FAQ" (microsoft/unilm): both rate and decay step
down at half of the training. The rate decays linearly all the while and restarts from a lower peak;
weight decay on latent weights makes codes flip, so it ends with the first stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Parameters up to which a peak is for, of both stages; larger models take the last
_PEAKS = ((1e9, (1.5e-3, 1e-3)), (float("inf"), (1.2e-3, 8e-4)))


@dataclass(frozen=True)
class TwoStages:
    """Rates, decays and when they change; makes an optimiser and its scheduler.

    ``Trainer(..., optimizers=TwoStages().create(model, steps=1000))``

    Attributes:
        rates: peak learning rate of each stage.
        decays: weight decay of each stage.
        warm_up: steps in which the rate rises from zero.
        switch: when the second stage begins, as a share of all steps.
        betas: of AdamW.
    """

    rates: tuple[float, float] = (1.5e-3, 1e-3)
    decays: tuple[float, float] = (0.1, 0.0)
    warm_up: int = 375
    switch: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if not all(rate > 0 for rate in self.rates):
            raise ValueError(f"`rates`: expected positive numbers, got {self.rates}")
        if not all(decay >= 0 for decay in self.decays):
            raise ValueError(f"`decays`: expected numbers of at least 0, got {self.decays}")
        if self.warm_up < 0:
            raise ValueError(f"`warm_up`: expected at least 0 steps, got {self.warm_up}")
        if not 0 < self.switch <= 1:
            raise ValueError(f"`switch`: expected a share above 0 and up to 1, got {self.switch}")

    @classmethod
    def for_size(cls, parameters: int) -> TwoStages:
        """Return the recipe with the peaks that the notes give for a model of that size.

        They begin at 700M; smaller models take those of 700M.
        """
        return cls(rates=next(rates for most, rates in _PEAKS if parameters <= most))

    def optimizer(self, model: nn.Module) -> AdamW:
        """Return AdamW over what is trainable; only matrices decay, no norms and no biases."""
        trainable = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trainable if p.ndim >= 2]
        vectors = [p for p in trainable if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.decays[0], "decays": True},
            {"params": vectors, "weight_decay": 0.0, "decays": False},
        ]
        return AdamW([g for g in groups if g["params"]], lr=self.rates[0], betas=self.betas)

    def scheduler(self, optimizer: Optimizer, steps: int) -> TwoStageScheduler:
        """Return the scheduler of a training of so many steps."""
        return TwoStageScheduler(optimizer, self, steps)

    def create(self, model: nn.Module, *, steps: int) -> tuple[AdamW, TwoStageScheduler]:
        """Return optimiser and scheduler, as ``Trainer`` takes them in ``optimizers``."""
        optimizer = self.optimizer(model)
        return optimizer, self.scheduler(optimizer, steps)

    def at(self, step: int, steps: int) -> tuple[float, int]:
        """Return the learning rate of a step, and its stage, 0 or 1.

        Args:
            step: 0 is the first.
            steps: of the whole training.
        """
        stage = int(step >= self.switch * steps)
        rate = self.rates[stage] * max(0.0, 1 - step / steps)
        return (rate * (step + 1) / self.warm_up if step < self.warm_up else rate), stage


class TwoStageScheduler(LRScheduler):
    """Sets the learning rate and the weight decay of each step.

    Args:
        optimizer: all groups get the rate of the recipe; those with a weight decay get its decay,
            others stay without.
        recipe: says when.
        steps: of the whole training.
    """

    def __init__(self, optimizer: Optimizer, recipe: TwoStages, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"`steps`: expected at least 1, got {steps}")
        if recipe.warm_up >= steps:
            raise ValueError(
                f"`warm_up`: expected fewer than the {steps} steps of the training, got "
                f"{recipe.warm_up}"
            )
        self.recipe, self.steps = recipe, steps
        # a decay may be zero in one stage: groups of `TwoStages` say whether they have one at all
        self.decayed = [g.get("decays", g["weight_decay"] > 0) for g in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the rate of each group, and set its weight decay."""
        rate, stage = self.recipe.at(self.last_epoch, self.steps)
        for group, is_decayed in zip(self.optimizer.param_groups, self.decayed):
            if is_decayed:
                group["weight_decay"] = self.recipe.decays[stage]
        return [rate for _ in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return how far it is; what it is made of is the caller's, who may go on otherwise."""
        own = ("recipe", "steps", "decayed")
        return {k: v for k, v in super().state_dict().items() if k not in own}
