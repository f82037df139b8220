"""Train a small ternary model in a loop of your own with accelerate, in one process or in several.

accelerate launch --num_processes 2 --cpu examples/train_accelerate.py
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import bitnet_triton as bt
from bitnet_triton.training import PackingCollator, TwoStages


def sums(count: int) -> list[dict]:
    """Return documents `a+b=` with the answer in digits, as bytes; answers alone have a loss."""
    pairs = [(i * 7 % 50, i * 11 % 50) for i in range(count)]
    texts = [(f"{a}+{b}=".encode(), f"{a + b}\n".encode()) for a, b in pairs]
    return [{"input_ids": [*ask, *answer], "prompt_len": len(ask)} for ask, answer in texts]


def main(steps: int = 100) -> list[float]:
    """Train, and return the loss of each step."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    config = bt.BitNetConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=10,
        attention={"mode": "sliding", "window": 64}, tie_word_embeddings=True,
    )  # fmt: skip
    model = bt.BitNetForCausalLM(config).train()
    optimizer, scheduler = TwoStages(warm_up=min(20, steps // 4)).create(model, steps=steps)
    loader = DataLoader(sums(10_000), batch_size=32, shuffle=True, collate_fn=PackingCollator())
    # the schedule counts steps of the optimiser: it stays as it is, whatever the processes
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for batch, _ in zip(loader, range(steps)):
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if len(losses) % 10 == 0:
            accelerator.print(f"step {len(losses)}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
