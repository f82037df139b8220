"""Between the device of a model and that of its memory: whatever moves, moves here."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class Transfers:
    """Moves tensors to the device of a memory and back.

    From a GPU to the CPU, copies go to pinned memory on a stream of their own; the host waits for
    them, since it computes with them next. Back, nobody waits but the stream of the model.

    Args:
        device: of the memory.

    Attributes:
        device: likewise.
        sent: how many tensors went to the memory.
        fetched: how many came back.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.sent = self.fetched = 0

    def send(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors on the device of the memory, ready to be read."""
        self.sent += len(tensors)
        device = tensors[0].device
        if not self._is_split(device) or any(t.requires_grad for t in tensors):
            return tuple(t.to(self.device) for t in tensors)
        stream, copied = _stream(device), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            there = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for target, t in zip(there, tensors):
                target.copy_(t, non_blocking=True)
                t.record_stream(stream)
            copied.record(stream)
        copied.synchronize()
        return tuple(there)

    def fetch(self, *tensors: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """Return tensors of the memory on the device of the model, as soon as it reads them."""
        self.fetched += len(tensors)
        if not self._is_split(device):
            return tuple(t.to(device) for t in tensors)
        stream, copied = _stream(device), torch.cuda.Event()
        with torch.cuda.stream(stream):
            back = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
            copied.record(stream)
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for t in back:
            t.record_stream(current)
        return tuple(back)

    def _is_split(self, device: torch.device) -> bool:
        return device.type == "cuda" and self.device.type == "cpu"


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all copies from and to a GPU: they run beside its kernels."""
    return torch.cuda.Stream(device)
