"""One of two processes that train together: ``python two_processes.py ddp|fsdp RANK FOLDER``.

Not a test: test_bit_linear_distributed.py starts it, and imports ``train`` for one process alone.
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bitnet_triton.nn import BitLinear

PROCESSES = 2
ROWS = 8
PATIENCE = 180  # seconds; whoever waits longer for the other one tells where


def new_model():
    """Odd sizes: shards are of different length, and the last one has padding."""
    torch.manual_seed(5)
    return nn.Sequential(BitLinear(39, 25), nn.Tanh(), BitLinear(25, 7, bias=False))


def train(model, rows):
    """Take three steps on some of the rows."""
    generator = torch.Generator().manual_seed(7)
    x, target = (torch.randn(3, ROWS, size, generator=generator)[:, rows] for size in (39, 7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        (model(x[step]) - target[step]).square().mean().backward()
        optimizer.step()


def main(mode, rank, folder):
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    model = new_model()
    if mode == "ddp":
        trained = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for part in (model[0], model[2], model):
            trained = fully_shard(part, mesh=mesh)
    half = ROWS // PROCESSES
    train(trained, slice(rank * half, (rank + 1) * half))
    state = {n: p.full_tensor() if mode == "fsdp" else p for n, p in model.state_dict().items()}
    torch.save(state, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
