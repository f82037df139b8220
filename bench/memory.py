"""Peak memory of one call, from the allocator's own records: exact, and the same on every run."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler reports its start and stop on stderr otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Run ``call`` and return what it allocated at its peak, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    ]
    running = itertools.accumulate(count for _, _, count in sorted(changes))
    return max(running, default=0)
