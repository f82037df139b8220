"""transformers' ``Trainer``, without the logits that nobody reads."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import Trainer


class LossTrainer(Trainer):
    """``Trainer`` that asks a model for its loss alone where nothing else is read of a call.

    That is in every step, but with ``label_smoothing_factor`` or ``compute_loss_func``, which make
    their loss of logits, and in evaluation without ``compute_metrics``. The logits of a long text
    over a large vocabulary take more memory than all the rest of a step beside packed weights.

    A subclass that overrides ``compute_loss`` gets all logits where it calls the one of this class
    with ``return_outputs=True``, and in evaluation, unless it sets ``evaluates_by_loss``.

    Attributes:
        evaluates_by_loss: whether ``compute_loss`` of the class needs no logits in evaluation
            without metrics; False for subclasses that override it and do not say.

    A model whose forward does not name ``skip_logits``, as that of ``BitNetForCausalLM`` does, is
    called as ever.

    Args:
        *args: as for ``Trainer``; adapters of peft may be around the model.
        **kwargs: as for ``Trainer``.
    """

    evaluates_by_loss = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "compute_loss" in vars(cls) and "evaluates_by_loss" not in vars(cls):
            cls.evaluates_by_loss = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._can_skip = "skip_logits" in inspect.signature(type(base).forward).parameters

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, by a call without logits unless the outputs are wanted."""
        if not return_outputs:
            inputs = self._without_logits(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Return loss, logits and labels of a batch; the loss alone without logits."""
        if prediction_loss_only and self.evaluates_by_loss:
            inputs = self._without_logits(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _without_logits(self, inputs: dict[str, Any]) -> dict[str, Any]:
        reads = self.label_smoother is not None or self.compute_loss_func is not None
        if reads or not self._can_skip or "labels" not in inputs:
            return inputs
        return {**inputs, "skip_logits": True}
