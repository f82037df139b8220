"""A training that is killed goes on bit for bit, and never from half a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from transformers import Trainer, TrainerState, TrainingArguments

from bitnet_triton.training import PackingCollator, SafeCheckpoints, TwoStages, last_checkpoint
from bitnet_triton.training.checkpoints import LIST, is_complete, mark_complete

# Trains, writes what each step has lost, and kills itself where it is told to: behind a step, or in
# the middle of a checkpoint, when the weights are written and nothing else is
SCRIPT = """
import json, os, signal, sys
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
import bitnet_triton as bt
from bitnet_triton.training import PackingCollator, SafeCheckpoints, TwoStages, last_checkpoint

folder, die_at, die_saving = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "saving"
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
             bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True)
torch.manual_seed(0)
model = bt.BitNetForCausalLM(bt.BitNetConfig(**sizes))
data = [{"input_ids": [3 + (s + i) % 60 for i in range(9)], "prompt_len": 2} for s in range(32)]
arguments = TrainingArguments(
    folder, max_steps=8, per_device_train_batch_size=4, save_steps=2, logging_steps=1,
    report_to=[], use_cpu=True, disable_tqdm=True, seed=3)

class Fate(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            with open(os.path.join(folder, "losses"), "a") as file:
                file.write(json.dumps([state.global_step, logs["loss"], logs["grad_norm"]]) + "\\n")
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == die_at and not die_saving:
            os.kill(os.getpid(), signal.SIGKILL)

class Mortal(Trainer):
    def _save_optimizer_and_scheduler(self, *args, **kwargs):
        if self.state.global_step == die_at and die_saving:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(*args, **kwargs)

trainer = Mortal(
    model, arguments, train_dataset=data, data_collator=PackingCollator(),
    optimizers=TwoStages(warm_up=2).create(model, steps=8), callbacks=[SafeCheckpoints(), Fate()])
trainer.train(resume_from_checkpoint=last_checkpoint(folder))
"""


def run(folder, die_at=0, when="step"):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(die_at), when]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGKILL if die_at else 0), done.stderr
    return {line[0]: line[1:] for line in map(json.loads, (folder / "losses").open())}


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")
    assert sorted(whole) == list(range(1, 9))

    killed = tmp_path / "killed"
    run(killed, die_at=5)
    assert last_checkpoint(killed).endswith("checkpoint-4")
    run(killed, die_at=6, when="saving")
    half = killed / "checkpoint-6"
    assert any(half.glob("*.safetensors"))
    assert not is_complete(half)
    assert last_checkpoint(killed).endswith("checkpoint-4")
    assert run(killed) == whole


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    mark_complete(folder)
    return folder


@pytest.mark.parametrize("damage", ["shorter", "gone", "no list", "broken list", "null", "bytes"])
def test_what_is_not_whole_is_no_checkpoint(damage, checkpoint, caplog):
    assert is_complete(checkpoint)
    if damage == "shorter":
        (checkpoint / "model.safetensors").write_bytes(b"weight")
    elif damage == "gone":
        (checkpoint / "model.safetensors").unlink()
    elif damage == "no list":
        (checkpoint / LIST).unlink()
    else:
        broken = {"broken list": b"{", "null": b"null", "bytes": b"\xff\xfe"}
        (checkpoint / LIST).write_bytes(broken[damage])
    assert last_checkpoint(checkpoint.parent) is None
    assert "was not written to its end" in caplog.text


def test_old_checkpoints_go_when_a_new_one_is_complete(masters, documents, tmp_path):
    arguments = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=4, save_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    optimizers = TwoStages(warm_up=1).create(masters, steps=6)
    Trainer(
        masters, arguments, train_dataset=documents, data_collator=PackingCollator(),
        optimizers=optimizers, callbacks=[SafeCheckpoints(keep=2)],
    ).train()  # fmt: skip
    kept = sorted(name for name in os.listdir(tmp_path) if name.startswith("checkpoint"))
    assert kept == ["checkpoint-5", "checkpoint-6"]
    assert last_checkpoint(tmp_path).endswith("checkpoint-6")
    assert last_checkpoint(tmp_path / "nothing") is None


def write_again(folder, when):
    """Say that a checkpoint was complete at another time."""
    path = folder / LIST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"written": when}))


def test_a_shorter_run_in_the_folder_of_a_longer_one_goes_on_with_its_own(tmp_path, caplog):
    for step, when in ((80, 1), (90, 2), (10, 3), (20, 4)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        mark_complete(folder)
        write_again(folder, when)
        os.utime(folder / LIST, (0, 100 - when))  # as a copy may have it
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-20")
    assert caplog.text == ""
    (tmp_path / "run" / "checkpoint-20" / LIST).unlink()
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-10")
    assert "checkpoint-20 was not written to its end" in caplog.text


def test_the_best_checkpoint_and_a_new_run_in_an_old_folder_stay(tmp_path):
    folders = {}
    for step in (7, 8, 1, 2, 3):
        folder = folders[step] = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        if step < 3:
            mark_complete(folder)
        elif step > 3:
            mark_complete(folder)
            write_again(folder, step)
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    state = TrainerState(global_step=3, best_model_checkpoint=str(folders[7]))
    SafeCheckpoints(keep=2).on_save(arguments, state, None)
    assert {step for step, folder in folders.items() if folder.exists()} == {2, 3, 7}


def test_limits_that_would_delete_too_early_are_refused(masters, documents, tmp_path):
    with pytest.raises(ValueError, match="`keep`"):
        SafeCheckpoints(keep=0)
    arguments = TrainingArguments(tmp_path, save_total_limit=1, report_to=[], use_cpu=True)
    trainer = Trainer(
        masters, arguments, train_dataset=documents, data_collator=PackingCollator(),
        callbacks=[SafeCheckpoints()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="`save_total_limit`"):
        trainer.train()
