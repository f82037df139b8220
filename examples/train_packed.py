"""Train a small ternary model with transformers' Trainer: packed documents, two stages, a monitor.

    python examples/train_packed.py --output runs/packed --steps 200

Killed and started again, it goes on from the last complete checkpoint.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import Trainer, TrainingArguments

import bitnet_triton as bt
from bitnet_triton.training import PackingCollator, SafeCheckpoints, TernaryMonitor, TwoStages
from bitnet_triton.training import last_checkpoint as last


def sums(count: int, seed: int) -> list[dict]:
    """Draw documents `a + b =` with the answer in digits, as bytes; answers alone have a loss."""
    rng = random.Random(seed)
    pairs = [(rng.randrange(50), rng.randrange(50)) for _ in range(count)]
    texts = [(f"{a}+{b}=".encode(), f"{a + b}\n".encode()) for a, b in pairs]
    return [{"input_ids": [*ask, *answer], "prompt_len": len(ask)} for ask, answer in texts]


def main(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the model.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 200,
) -> None:
    """Train, and save the masters; `bitnet-triton pack` makes a packed checkpoint of them."""
    torch.manual_seed(0)
    config = bt.BitNetConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=10, attention="full", tie_word_embeddings=True,
    )  # fmt: skip
    model = bt.BitNetForCausalLM(config)
    arguments = TrainingArguments(
        str(output), max_steps=steps, per_device_train_batch_size=64, logging_steps=10,
        save_steps=50, report_to=[], include_num_input_tokens_seen=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=sums(20_000, seed=0), data_collator=PackingCollator(),
        optimizers=TwoStages(warm_up=min(20, steps // 4)).create(model, steps=steps),
        callbacks=[TernaryMonitor(), SafeCheckpoints()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=last(output))
    trainer.save_model(str(output / "model"))


if __name__ == "__main__":
    typer.run(main)
