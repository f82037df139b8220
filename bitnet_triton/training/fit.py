"""One training by transformers' ``Trainer``, with the parts of this package, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from bitnet_triton.training.checkpoints import SafeCheckpoints, last_checkpoint
from bitnet_triton.training.documents import Document
from bitnet_triton.training.loss_trainer import LossTrainer
from bitnet_triton.training.monitor import TernaryMonitor
from bitnet_triton.training.packing import PackingCollator, pack_rows
from bitnet_triton.training.recipe import TwoStages

# What is done, steps done, steps in all, loss
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast something is trained.

    Attributes:
        row: tokens of a row of packed documents.
        accumulate: rows of a step.
        epochs: times that every document is seen.
        rate: peak learning rate; it falls by a cosine, or by ``recipe``.
        warm_up: share of the steps in which the rate rises.
        seed: of the order of rows, and of dropout.
        save_every: steps between checkpoints.
        recipe: the two stages of b1.58 instead of a cosine, from the learning rate on.
        bfloat16: autocast, for masters in float32.
    """

    row: int
    accumulate: int = 1
    epochs: int = 1
    rate: float = 1e-4
    warm_up: float = 0.05
    seed: int = 0
    save_every: int = 50
    recipe: bool = False
    bfloat16: bool = False


def fit(
    model: nn.Module,
    documents: Sequence[Document],
    held_out: Sequence[Document],
    schedule: Schedule,
    output: Path,
    progress: Progress | None = None,
    make_trainer: Callable[..., Trainer] = LossTrainer,
) -> dict[str, Any]:
    """Train a model on documents, or go on where a killed training was.

    Args:
        model: with something to train.
        documents: to train on.
        held_out: to measure the loss on, before and after.
        schedule: how.
        output: folder of the checkpoints.
        progress: called after each step.
        make_trainer: makes it of what ``Trainer`` takes, for a loss of its own. Default: the loss
            of the labels, without logits.

    Returns:
        ``steps``, ``tokens``, ``trained`` parameters, the ``log``, and the losses ``before`` and
        ``after`` on what was held out.
    """
    rows = list(pack_rows(documents, schedule.row))
    steps = schedule.epochs * -(-len(rows) // schedule.accumulate)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=schedule.accumulate,
        num_train_epochs=schedule.epochs,
        learning_rate=schedule.rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(schedule.warm_up * steps),
        logging_steps=1,
        save_steps=schedule.save_every,
        seed=schedule.seed,
        data_seed=schedule.seed,
        bf16=schedule.bfloat16,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,  # rows are lists of documents
        report_to=[],
        disable_tqdm=True,
    )
    more: dict[str, Any] = {}
    if schedule.recipe:
        stages = TwoStages(
            rates=(schedule.rate, schedule.rate * 2 / 3), warm_up=round(schedule.warm_up * steps)
        )
        more["optimizers"] = stages.create(model, steps=steps)
    trainer = make_trainer(
        model,
        arguments,
        PackingCollator(tell_prompts=True),
        train_dataset=_Rows(rows),
        eval_dataset=_Rows(list(pack_rows(held_out, schedule.row))),
        callbacks=[SafeCheckpoints(), _Tell(progress or (lambda *args: None))],
        **more,
    )
    TernaryMonitor().attach(trainer)
    trainer.remove_callback(PrinterCallback)  # who asks is told by `progress`
    resumed = last_checkpoint(output)
    told = output / "before.json"
    before = None
    if resumed is None and held_out:
        before = trainer.evaluate()["eval_loss"]
        output.mkdir(parents=True, exist_ok=True)
        told.write_text(repr(before), encoding="utf-8")
    elif told.exists():
        before = float(told.read_text(encoding="utf-8"))
    trainer.train(resume_from_checkpoint=resumed)
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "steps": steps,
        "tokens": schedule.epochs * sum(len(d["input_ids"]) for d in documents),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss_before": before,
        "loss_after": trainer.evaluate()["eval_loss"] if held_out else None,
        "log": log,
    }


@torch.no_grad()
def mean_loss(model: Any, documents: Sequence[Document], row: int) -> float | None:
    """Return the loss of a model on documents as ``fit`` has it: a mean over packed rows.

    Args:
        model: a ``BitNetForCausalLM``, in evaluation.
        documents: with prompts.
        row: tokens of a row.

    Returns:
        None where there are no documents.
    """
    collate, losses = PackingCollator(tell_prompts=True), []
    for packed in pack_rows(documents, row):
        batch = {
            name: value.to(model.device) if hasattr(value, "to") else value
            for name, value in collate([packed]).items()
        }
        losses.append(model(**batch, skip_logits=True).loss.item())
    return sum(losses) / len(losses) if losses else None


class _Rows(torch.utils.data.Dataset):
    """Rows of documents, one an item."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class _Tell(TrainerCallback):
    """Passes on how far a training is."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass on the step and its loss."""
        loss = kwargs["logs"].get("loss")
        if loss is not None:
            self.progress("train", state.global_step, state.max_steps, loss)
