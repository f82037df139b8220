"""Checks in several processes: a kernel compiles for a second, on one core.

Functions do not travel between processes: each worker makes the items of a section from the plan,
which gives the same ones in the same order, and is told which to run.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from bench.suite.plan import Done, Item, Outcome, Plan, Progress, Section, Tell, failed, run_item

_MOST_JOBS = 8

# Items by their place in the section
Running = dict[Future[Done], int]


def count_cpus() -> int:
    """Return how many CPUs this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def default_jobs(device: torch.device) -> int:
    """Return how many checks run at a time: half of the CPUs beside a GPU, one without."""
    return max(1, min(_MOST_JOBS, count_cpus() // 2)) if device.type == "cuda" else 1


class Workers:
    """Processes that run checks; the first section starts them.

    Args:
        plan: how a run goes.
        jobs: how many items run at a time.
    """

    def __init__(self, plan: Plan, jobs: int) -> None:
        self.plan, self.jobs = plan, jobs
        self._pool: ProcessPoolExecutor | None = None

    def run_section(self, section: Section, deadline: float, tell: Tell) -> Outcome:
        """Run the items of a section as ``plan.run_section`` does, several at a time."""
        progress = Progress(section, self.plan, deadline, tell)
        items = section.items(self.plan)
        running: Running = {}
        for index, item in enumerate(items):
            if len(running) == self.jobs:
                _collect(running, items, progress)
            if progress.may_start(item):
                running[self._submit(section, index)] = index
        while running:
            _collect(running, items, progress)
        if progress.broken:
            self.close()  # processes that have lost their device get no more work
        return progress.outcome()

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _submit(self, section: Section, index: int) -> Future[Done]:
        if self._pool is None:
            # a forked process could not use the GPU
            self._pool = ProcessPoolExecutor(
                self.jobs,
                multiprocessing.get_context("spawn"),
                initializer=torch.set_num_threads,
                initargs=(max(1, count_cpus() // self.jobs),),
            )
        try:
            return self._pool.submit(_run, section, self.plan, index)
        except BrokenProcessPool as error:
            future: Future[Done] = Future()
            future.set_exception(error)
            return future


def _run(section: Section, plan: Plan, index: int) -> Done:
    return run_item(section.items(plan)[index], index, plan)


def _collect(running: Running, items: Sequence[Item], progress: Progress) -> None:
    """Wait until an item has ended; put down what it gave."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        index = running.pop(future)
        error = future.exception()
        if error is None:
            progress.add(index, future.result())
        else:  # its process has ended, and those beside it were ended too
            item = items[index]
            broken = f"a process ended in {item.name}"
            progress.add(index, Done([failed(item, error)], 0.0, broken))
