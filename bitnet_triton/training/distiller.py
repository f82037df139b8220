"""A trainer whose loss has three terms: the next token, a teacher's logits, and its relations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_triton.training.loss_trainer import LossTrainer
from bitnet_triton.training.packing import IGNORED
from bitnet_triton.training.relations import (
    find_documents,
    logits_loss,
    projections,
    relation_loss,
)

_READ = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Lesson:
    """What a student is to learn from a teacher, and how much each part of it counts.

    Attributes:
        teacher: a causal language model of transformers, with the tokens of the student.
        logits: weight of ``logits_loss``, over the tokens that have a label.
        relations: weight of ``relation_loss``, of queries, keys and values together.
        temperature: of the logits.
        layer: whose relations count, in both models; negative numbers count from the end.
    """

    teacher: Any
    logits: float
    relations: float
    temperature: float
    layer: int

    def terms(
        self, batch: Mapping[str, Any], logits: Tensor, projected: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the weighted terms of a batch, each a mean over its tokens.

        Args:
            batch: ``input_ids``, ``labels``, and what tells documents apart.
            logits: the student's [B T V].
            projected: the student's, as ``projections`` gives them.
        """
        found: dict[str, Tensor] = {}
        inputs = {name: batch[name] for name in _READ if batch.get(name) is not None}
        with torch.no_grad(), projections(self.teacher.base_model, self.layer) as taught:
            wanted = self.teacher(**inputs, use_cache=False).logits
        if self.logits:
            has_label = batch["labels"][:, 1:] != IGNORED
            found["logits"] = self.logits * logits_loss(
                logits[:, :-1][has_label], wanted[:, :-1][has_label], temperature=self.temperature
            )
        if self.relations:
            documents = find_documents(batch)
            parts = [relation_loss(projected[name], taught[name], documents) for name in taught]
            found["relations"] = self.relations * torch.stack(parts).sum()
        return found


class Distiller(LossTrainer):
    """``Trainer`` with the terms of a lesson in its loss while it trains.

    Each line of the log has them as ``loss_logits`` and ``loss_relations``, by how much they count.
    Evaluation is about the next token alone, without logits.

    Args:
        *args: as for ``Trainer``.
        lesson: what is taught.
        **kwargs: as for ``Trainer``; the model has to take ``num_items_in_batch``.
    """

    evaluates_by_loss = True

    def __init__(self, *args: Any, lesson: Lesson, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lesson = lesson
        self._told: dict[str, float] = defaultdict(float)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch; a step that has several counts each by its labels."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        student = self.accelerator.unwrap_model(model)
        with projections(student.base_model, self.lesson.layer) as projected:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        share: Any = 1.0
        if num_items_in_batch is not None:
            share = (inputs["labels"][:, 1:] != IGNORED).sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:  # Trainer counts those of all processes
                share = share * self.accelerator.num_processes
        for name, term in self.lesson.terms(inputs, outputs.logits, projected).items():
            loss = loss + share * term
            self._told[f"loss_{name}"] += float(share * term.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms since the line before."""
        if "loss" in logs:
            steps = max(1, round(self.state.logging_steps or self.args.logging_steps))
            logs |= {name: value / steps for name, value in self._told.items()}
            self._told.clear()
        super().log(logs, *args, **kwargs)
