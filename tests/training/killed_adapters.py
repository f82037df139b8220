"""LoRA beside packed weights under ``Trainer``: ``python killed_adapters.py FOLDER [N]``.

Not a test: test_killed_adapters.py starts it. With N it is killed by SIGKILL in the N-th file that
``torch.save`` writes, half of which is on disk.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import peft
import torch
from transformers import Trainer, TrainingArguments

import bitnet_triton as bt
from bitnet_triton.training import PackingCollator, SafeCheckpoints, TwoStages, last_checkpoint

STEPS = 6


def die_in_file(number):
    written, save = [0], torch.save

    def half(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        written[0] += 1
        if written[0] == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def main(folder, number=None):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if number is not None:
        die_in_file(int(number))
    base = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL)
    bt.set_attention(base, {"preset": "swaa-trained", "window": 8})
    lora = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj"])
    model = peft.get_peft_model(base, lora)
    documents = [
        {"input_ids": [3 + (start + i) % 60 for i in range(size)], "prompt_len": 2}
        for start, size in enumerate([12, 7, 20, 9, 15] * 8)
    ]
    arguments = TrainingArguments(
        folder, max_steps=STEPS, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, PackingCollator(), documents, callbacks=[SafeCheckpoints()],
        optimizers=TwoStages(rates=(5e-3, 2e-3), warm_up=2).create(model, steps=STEPS),
    )  # fmt: skip
    resumed = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=resumed)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    end = {"adapters": trained, "optimizer": trainer.optimizer.state_dict()["state"]}
    torch.save(end, Path(folder, "end.pt"))
    Path(folder, "done.json").write_text(json.dumps({"resumed": resumed, "losses": losses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
