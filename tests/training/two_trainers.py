"""One of two processes that train a model together: ``python two_trainers.py ddp|fsdp FOLDER``.

Not a test: test_two_trainers.py starts it with the environment of ``torchrun``, and imports it for
one process alone. ``ddp`` is transformers' Trainer. ``fsdp`` shards decoder layers by the class
that the model names for it, in a loop of its own: accelerate takes FSDP to GPUs alone, and trains
by DDP on a CPU whatever it is told. Two processes make no logits of all tokens, one does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import bitnet_triton as bt
from bitnet_triton.training import LossTrainer, PackingCollator, SafeCheckpoints, last_checkpoint

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
STEPS, ROWS = 4, 8


def new_model():
    torch.manual_seed(0)
    config = bt.BitNetConfig(**SIZES, attention={"preset": "swaa-trained", "window": 4})
    return bt.BitNetForCausalLM(config).train()


def documents():
    return [
        {"input_ids": [3 + (start + i) % 60 for i in range(12)], "prompt_len": 2}
        for start in range(64)
    ]


def train_with_trainer(folder, processes=1):
    arguments = TrainingArguments(
        folder, max_steps=STEPS, save_steps=2, logging_steps=1, learning_rate=2e-3,
        per_device_train_batch_size=ROWS // processes, use_cpu=True, report_to=[],
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    kind = LossTrainer if processes > 1 else Trainer
    trainer = kind(
        new_model(), arguments, PackingCollator(), documents(), callbacks=[SafeCheckpoints()]
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    wrapper = type(trainer.model_wrapped).__name__
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], wrapper


def train_by_hand(model, rank=0, processes=1):
    """Return the losses of the whole batch in each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    size, losses = ROWS // processes, []
    for step in range(STEPS):
        start = step * ROWS + rank * size
        batch = PackingCollator()(documents()[start : start + size])
        loss = model(**batch, skip_logits=processes > 1).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item() / processes)
    return losses


def train_sharded(folder):
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model, mesh = new_model(), init_device_mesh("cpu", (processes,))
    sharded = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    # the head by itself: what multiplies by its weight has to gather it
    for module in [*sharded, model.lm_head, model]:
        fully_shard(module, mesh=mesh)
    losses = train_by_hand(model, rank, processes)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    return losses, f"{len(sharded)} layers"


def main(kind, folder):
    torch.set_num_threads(1)
    told = train_sharded(folder) if kind == "fsdp" else train_with_trainer(folder, processes=2)
    if dist.get_rank() == 0:
        Path(folder, "done.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
