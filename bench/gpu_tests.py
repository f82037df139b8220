"""The tests of the kernels, run on one device for a given time: correctness is pytest's job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]
# where tests are that run on every device, and those marked for a GPU
FOLDERS = ("tests/kernels", "tests/models", "tests/runtime", "tests/bench/test_decode_steps.py")
_MOST_JOBS = 8
# a test that has begun in time may go on for so long
_GRACE_S = 120.0


def default_jobs(device: str) -> int:
    """Return how many tests run at a time: a kernel compiles for a second, on one core."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(_MOST_JOBS, (cpus or 1) // 2)) if device == "cuda" else 1


def run_tests(
    device: str,
    *,
    budget_s: float,
    seed: int,
    jobs: int,
    paths: Sequence[str] = FOLDERS,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the tests of a device with the Triton backend; return plain data.

    Files take turns and the order in each is drawn, so that what does not fit into the time is a
    sample of everything. A kernel that cannot run is a failure.

    Args:
        device: "cuda" or "cpu".
        budget_s: what has not begun by then is skipped.
        seed: of the inputs and of the order.
        jobs: processes.
        paths: of the tests, in the checkout.
        tell: is told what happens.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--only-on", device),
            *("--seed", str(seed), "--until", str(time.time() + budget_s)),
            *("--results", str(results), *(("-n", str(jobs)) if jobs > 1 else ()), *paths),
        ]
        tell(f"tests: {' '.join(paths)} on {device}, {budget_s:.0f} s, {jobs} at a time")
        try:
            done = subprocess.run(
                command, cwd=CHECKOUT, capture_output=True, text=True, check=False,
                timeout=budget_s + _GRACE_S,
            )  # fmt: skip
            broken = "" if done.returncode in (0, 1) else _last_lines(done.stdout + done.stderr)
        except subprocess.TimeoutExpired:
            broken = f"a test did not end within {_GRACE_S:.0f} s"
        lines = results.read_text().splitlines() if results.exists() else []
    return summary([json.loads(line) for line in lines], broken, time.monotonic() - start)


def summary(lines: Sequence[dict[str, Any]], broken: str, seconds: float) -> dict[str, Any]:
    """Return counts by file, failures with their reasons, and why tests were skipped."""
    counts: dict[str, Counter[str]] = {}
    for line in lines:
        counts.setdefault(line["name"].split("::")[0], Counter())[line["outcome"]] += 1
    failed = [
        {"name": line["name"], "reason": (line["reason"].strip().splitlines() or [""])[0]}
        for line in lines
        if line["outcome"] == "failed"
    ]
    if not lines and not broken:
        broken = "no test ran"
    if broken:
        failed.append({"name": "the run of the tests", "reason": broken})
    skipped = Counter(
        line["reason"].removeprefix("Skipped: ") for line in lines if line["outcome"] == "skipped"
    )
    return {
        "seconds": seconds,
        "files": {file: dict(count) for file, count in sorted(counts.items())},
        "failed": failed,
        "skipped": dict(skipped),
    }


def _last_lines(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-5:])
