"""What the suite is made of: items in sections, and the time that they share."""

from __future__ import annotations

import math
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


# A quick run leaves out what compiles for long, and would not start anything by a longer guess
_QUICK_GUESS_S = 4.0


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
        most_s: it never gets more time than this.
    """

    name: str
    title: str
    kind: str
    weight: float
    guess_s: float
    items: Callable[[Plan], Sequence[Item]]
    most_s: float = math.inf


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
        self._sections = list(sections)

    def next_deadline(self) -> float:
        """Return when the next section has to end, on the clock of ``time.monotonic``."""
        now = time.monotonic()
        share = self._sections[0].weight / sum(section.weight for section in self._sections)
        section = self._sections.pop(0)
        return now + min(max(0.0, self._end - now) * share, section.most_s)


@dataclass(frozen=True)
class Done:
    """What running an item gave.

    Attributes:
        results: plain data.
        seconds: that it took.
        broken: why nothing else can run here; "" if it can.
    """

    results: list[Result]
    seconds: float
    broken: str = ""


class Progress:
    """What a section has given so far, and whether another item may start.

    Args:
        section: what is run.
        plan: how.
        deadline: when it has to end, on the clock of ``time.monotonic``.
        tell: is told what happens.
    """

    def __init__(self, section: Section, plan: Plan, deadline: float, tell: Tell) -> None:
        self._section, self._quick, self._deadline, self._tell = section, plan.quick, deadline, tell
        self._start = time.monotonic()
        self._results: dict[int, list[Result]] = {}
        self._skipped: list[dict[str, str]] = []
        self._longest: float | None = None
        self.broken = ""

    def may_start(self, item: Item) -> bool:
        """Tell whether the longest item so far would still end in time; if not, list this one."""
        guess = self._section.guess_s
        if self._quick:
            guess = min(guess, _QUICK_GUESS_S)
        need = guess if self._longest is None else self._longest
        reason = self.broken or _no_time(self._deadline - time.monotonic(), need)
        if self._quick and not item.essential:
            reason = "not part of --quick"
        if reason:
            self._skipped.append({"name": item.name, "reason": reason})
        else:
            self._tell(f"{self._section.name}: {item.name}")
        return not reason

    def add(self, index: int, done: Done) -> None:
        """Put down what the item at a place in its section gave."""
        for result in done.results:
            if result["status"] == "failed":
                self._tell(f"{self._section.name}: FAILED {result['name']}: {result['reason']}")
        self._results[index] = done.results
        self._longest = max(self._longest or 0.0, done.seconds)
        self.broken = self.broken or done.broken

    def outcome(self) -> Outcome:
        """Return the results in the order of the items, whichever ended first."""
        return Outcome(
            self._section.name,
            self._section.title,
            self._section.kind,
            [result for _, results in sorted(self._results.items()) for result in results],
            self._skipped,
            time.monotonic() - self._start,
        )


def run_section(section: Section, plan: Plan, deadline: float, tell: Tell) -> Outcome:
    """Run the items of a section until its time is up; list those that are left out.

    An item starts if the longest of the section so far would still end in time.

    Args:
        section: what is run.
        plan: how.
        deadline: when it has to end, on the clock of ``time.monotonic``.
        tell: is told what happens.
    """
    progress = Progress(section, plan, deadline, tell)
    for index, item in enumerate(section.items(plan)):
        if progress.may_start(item):
            progress.add(index, run_item(item, index, plan))
    return progress.outcome()


def run_item(item: Item, index: int, plan: Plan) -> Done:
    """Run the item at a place in its section, on random inputs that no other item has."""
    start = time.monotonic()
    try:
        torch.manual_seed(plan.settings.seed + index)
        results = item.run()
    except Exception as error:  # whatever it raises belongs in the report
        results = [failed(item, error)]
    broken = broken_device(plan.device, item.name)
    return Done(results, time.monotonic() - start, broken)


def failed(item: Item, error: BaseException) -> Result:
    """Return the result of an item that has raised."""
    return {"name": item.name, "status": "failed", "reason": first_line(error)}


def _no_time(left: float, need: float) -> str:
    return "" if left >= need else f"needs about {need:.0f} s, {max(0.0, left):.0f} s are left"


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    message = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {message[0]}"


def skipped_section(section: Section, reason: str) -> Outcome:
    """Return the outcome of a section that cannot run."""
    skipped = [{"name": "all of it", "reason": reason}]
    return Outcome(section.name, section.title, section.kind, skipped=skipped)


def broken_device(device: torch.device, after: str) -> str:
    """Say that a GPU has stopped answering: an illegal access ends every later call as well."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return f"the device stopped working in {after} ({first_line(error)})"
    return ""
