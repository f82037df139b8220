"""One of two processes that hold a model together: ``python two_parts.py RANK FOLDER``.

Not a test: test_tensor_parallel.py starts it, and imports ``ask`` for one process alone.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed.configuration_utils import DistributedConfig

import bitnet_triton as bt

PROCESSES = 2
PATIENCE = 180  # seconds; whoever waits longer for the other one tells where
NEW_TOKENS = 3


def ask(model, ids):
    """Return what a model makes of ids [B T], by every way that is compared."""
    padded = torch.cat([torch.zeros_like(ids[:, :1]), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 1).long().expand_as(padded)
    with torch.no_grad():
        first = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], past_key_values=first.past_key_values)
        answers = {
            "logits": first.logits,
            "next logits": step.logits,
            "loss": model(ids, labels=ids, skip_logits=True).loss,
        }
        answers["greedy"] = model.generate(
            padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, eos_token_id=None
        )
        answers["sampled"] = model.generate(
            ids, do_sample=True, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            cache_implementation="static",
        )  # fmt: skip
    return answers


def main(rank, folder):
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("bitnet_triton").addHandler(handler)
    logging.getLogger("bitnet_triton").setLevel(logging.INFO)

    ids = torch.load(folder / "ids.pt")
    told = {}
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        name = checkpoint.name
        if name == "packed":
            how = {"tp_plan": "auto"}
        else:
            how = {"distributed_config": DistributedConfig(tp_size=PROCESSES)}
        model = bt.BitNetForCausalLM.from_pretrained(checkpoint, **how)
        torch.manual_seed(3 + rank)
        answers = ask(model, ids[name])
        if name == "packed":
            decoder = bt.BitNetModel.from_pretrained(checkpoint, **how)
            answers["hidden"] = decoder(ids[name]).last_hidden_state
        torch.save(answers, folder / f"{name}-{rank}.pt")
        told[name] = {
            "parameters": model.num_parameters(),
            "bytes": sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values()),
            "refused": "",
        }
        try:
            model.save_pretrained(folder / f"saved-{name}")
        except ValueError as error:
            told[name]["refused"] = str(error)
        try:
            model.init_continuous_batching()
        except ValueError as error:
            told[name]["batching"] = str(error)
    told["heard"] = heard
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
