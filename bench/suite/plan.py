"""What the suite is made of: items in sections, and the time that they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.case import Settings
from bench.peaks import Peaks

# A result is plain data with at least "name", "status" and "reason"
Result = dict[str, Any]
Tell = Callable[[str], None]


@dataclass
class Plan:
    """How a run goes.

    Attributes:
        settings: of the timings; its device is where everything runs.
        quick: only what is essential.
        peaks: what the machine can do, once it has been measured.
    """

    settings: Settings
    quick: bool = False
    peaks: Peaks | None = None

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.settings.device

    @property
    def small(self) -> bool:
        """Whether sizes are those for a CPU: to see that it runs, not to measure."""
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Item:
    """A part of a section that is run or skipped as a whole.

    Attributes:
        name: for the report.
        run: returns its results; what it raises is a failure under this name.
        essential: stays in a quick run.
    """

    name: str
    run: Callable[[], list[Result]]
    essential: bool = True


@dataclass(frozen=True)
class Section:
    """A group of items under a name that can be chosen.

    Attributes:
        name: on the command line.
        title: for the table.
        kind: "check" or "speed": what its results look like.
        weight: its share of the time, relative to the sections after it; what it leaves is theirs.
        guess_s: how long its first item may take, compilation included.
        items: makes the items.
    """

    name: str
    title: str
    kind: str
    weight: float
    guess_s: float
    items: Callable[[Plan], Sequence[Item]]


@dataclass
class Outcome:
    """What a section gave; plain data, written to the JSON."""

    name: str
    title: str
    kind: str
    results: list[Result] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Result]:
        """Results that make the run fail: wrong checks, and kernels of this package in timings."""
        return [r for r in self.results if r["status"] == "failed" and not r.get("peer")]


class Clock:
    """Hands out the time of a run, a section after the other.

    Args:
        budget_s: for all sections together.
        sections: those that will run, in order.
    """

    def __init__(self, budget_s: float, sections: Sequence[Section]) -> None:
        self._end = time.monotonic() + budget_s
        self._weights = [section.weight for section in sections]

    def next_deadline(self) -> float:
        """Return when the next section has to end, on the clock of ``time.monotonic``."""
        now = time.monotonic()
        share = self._weights[0] / sum(self._weights)
        del self._weights[0]
        return now + max(0.0, self._end - now) * share


def run_section(section: Section, plan: Plan, deadline: float, tell: Tell) -> Outcome:
    """Run the items of a section until its time is up; list those that are left out.

    An item starts if the longest of the section so far would still end in time.

    Args:
        section: what is run.
        plan: how.
        deadline: when it has to end, on the clock of ``time.monotonic``.
        tell: is told what happens.
    """
    outcome, begin, longest = Outcome(section.name, section.title, section.kind), None, None
    start, broken = time.monotonic(), ""
    for item in section.items(plan):
        begin = time.monotonic()
        need = section.guess_s if longest is None else longest
        reason = broken or _no_time(deadline - begin, need)
        if plan.quick and not item.essential:
            reason = "not part of --quick"
        if reason:
            outcome.skipped.append({"name": item.name, "reason": reason})
            continue
        tell(f"{section.name}: {item.name}")
        results = _run_item(item)
        for result in results:
            if result["status"] == "failed":
                tell(f"{section.name}: FAILED {result['name']}: {result['reason']}")
        outcome.results += results
        broken = _broken_device(plan.device, item.name)
        longest = max(longest or 0.0, time.monotonic() - begin)
    outcome.seconds = time.monotonic() - start
    return outcome


def _no_time(left: float, need: float) -> str:
    return "" if left >= need else f"needs about {need:.0f} s, {max(0.0, left):.0f} s are left"


def _run_item(item: Item) -> list[Result]:
    try:
        return item.run()
    except Exception as error:  # whatever it raises belongs in the report
        return [{"name": item.name, "status": "failed", "reason": first_line(error)}]


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    message = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {message[0]}"


def _broken_device(device: torch.device, after: str) -> str:
    """Say that a GPU has stopped answering: an illegal access ends every later call as well."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return f"the device stopped working in {after} ({first_line(error)})"
    return ""
