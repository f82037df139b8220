"""What a benchmark case is made of; no timing code here and none in the cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Point = Mapping[str, Any]
Outputs = Tensor | Mapping[str, Tensor]


class PeerMissingError(Exception):
    """A provider cannot be built here; the message is the reason that the report shows."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        dtype: of the inputs.
        device: where everything runs.
        threads: of PyTorch, for every provider.
        rounds: how often each provider has its turn; fewer where the budget is spent.
        block_s: aim for the length of one turn, in seconds.
        budget_s: aim for the timing of one point of the grid, in seconds.
        pause_s: between two turns, in seconds.
        seed: of all random inputs.
    """

    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    threads: int = 1
    rounds: int = 15
    block_s: float = 0.1
    budget_s: float = 15.0
    pause_s: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("threads", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}`: expected at least 1, got {getattr(self, name)}")
        for name in ("block_s", "budget_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}`: expected more than 0, got {getattr(self, name)}")

    @property
    def generator(self) -> torch.Generator:
        """A fresh random source; equal settings give equal inputs."""
        return torch.Generator(self.device).manual_seed(self.seed)


@dataclass(frozen=True)
class Work:
    """One provider, ready to run at one point.

    Attributes:
        call: what is timed.
        output: what is compared with the reference; ``call`` itself if None.
        expected: what it is compared with, where the reference of the case is another's.
        read_bytes: memory that one call has to read and write at least once, as this provider
            stores it.
        units: how many units (tokens) one call makes; 1 for plain times.
        calls: how many calls ``call`` makes in a row, where one is too short to be timed.
        grad: record gradients while it runs.
        compiles: its first call compiles; without that, a call that was checked is warm.
        details: more facts for the report, plain data. "flops": of this provider, where they are
            not those of the case; "at_most": baseline -> how many times as fast it can be, by the
            operations or the memory of both.
    """

    call: Callable[[], Any]
    output: Callable[[], Outputs] | None = None
    expected: Callable[[], Outputs] | None = None
    read_bytes: int = 0
    units: int = 1
    calls: int = 1
    grad: bool = False
    compiles: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        label: for tables and plots.
        build: takes the inputs of a point; raises ``PeerMissingError`` with the reason where the
            provider cannot exist.
        tolerance: largest relative RMS error against the reference; None: it computes something
            that cannot be compared, which ``note`` explains.
        arithmetic: "int8", "bf16" or "fp32": the measured rate that its share refers to.
        note: what it computes otherwise than the others.
        default: runs without being named.
    """

    label: str
    build: Callable[[Any], Work]
    tolerance: float | None
    arithmetic: str = "bf16"
    note: str = ""
    default: bool = True


@dataclass(frozen=True)
class Case:
    """A workload, its providers and its grid.

    Attributes:
        name: on the command line and of the result file.
        title: for the table and the plot.
        grid: the points.
        inputs: takes the point's values as keywords and ``settings``; what it returns goes to
            ``reference`` and to every ``Provider.build``.
        reference: the outputs that every provider has to give.
        providers: by their name on the command line; ours is first.
        baselines: names of the providers that the others are divided by, most important first.
        flops: of one call at a point.
        unit: of ``Work.units`` for rates such as "tokens"; "" for plain times.
        panels: keys of a point that make the rows and the columns of the plot.
        curve: key of a point that a plot of lines runs over; "" for bars.
    """

    name: str
    title: str
    grid: Sequence[Point]
    inputs: Callable[..., Any]
    reference: Callable[[Any], Outputs]
    providers: Mapping[str, Provider]
    baselines: tuple[str, ...]
    flops: Callable[..., float]
    unit: str = ""
    panels: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    curve: str = ""

    def with_grid(self, grid: Sequence[Point]) -> Case:
        """Return the case on other points."""
        return replace(self, grid=grid)

    def select_points(self, only: Mapping[str, Sequence[str]]) -> list[Point]:
        """Return the points whose values are among those that ``only`` allows for a key.

        Raises:
            ValueError: a key or a value stands in no point, or no point is left.
        """
        for key, values in only.items():
            known = list(dict.fromkeys(str(point[key]) for point in self.grid if key in point))
            if not known:
                keys = ", ".join(dict.fromkeys(key for point in self.grid for key in point))
                raise ValueError(f"`only`: {self.name} has the keys {keys}, got {key!r}")
            for value in values:
                if value not in known:
                    raise ValueError(f"`only`: {key} is one of {', '.join(known)}, got {value!r}")
        points = [
            point
            for point in self.grid
            if all(key in point and str(point[key]) in values for key, values in only.items())
        ]
        if not points:
            raise ValueError("`only`: no point of the grid is left")
        return points

    def select_providers(self, names: Sequence[str]) -> dict[str, Provider]:
        """Return the providers called ``names``, the default ones if there are none.

        Raises:
            ValueError: a name is unknown.
        """
        for name in names:
            if name not in self.providers:
                known = ", ".join(self.providers)
                raise ValueError(f"`provider`: {self.name} has {known}; got {name!r}")
        return {n: p for n, p in self.providers.items() if (n in names if names else p.default)}
