"""What is wrong with an argument is said by the argument's name, before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Number = TypeVar("Number", int, float)
# Positions and lengths are int32 in the kernels
MOST_TOKENS = 2**31 - 1


class WrongArgumentError(Exception):
    """An argument that no command can use: one line, and exit code 2.

    No ValueError: typer would take it for a failed conversion and lose its text.
    """


class Dtype(str, Enum):
    """Floating-point numbers that a command computes or stores in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    def to_torch(self) -> torch.dtype:
        """Return torch's dtype of that name."""
        import torch

        return getattr(torch, self.value)


class Backend(str, Enum):
    """The backends that can be forced, by the names that ``use_backend`` knows."""

    triton = "triton"
    compile = "compile"
    reference = "reference"
    triton_cpu = "triton-cpu"


def number(
    option: str,
    kind: type[Number],
    *,
    least: Number | None = None,
    most: Number | None = None,
    above: Number | None = None,
    hint: str = "",
) -> Callable[[Any], Number]:
    """Return a parser that refuses what is out of range, infinite or no number.

    Args:
        option: the name that the message begins with.
        kind: int or float.
        least: the smallest number that is accepted.
        most: the largest one.
        above: numbers have to be larger than this one.
        hint: what to do instead, after the expected range.
    """
    noun = "an integer" if kind is int else "a number"
    limits = [("of at least", least), ("above", above), ("up to", most)]
    wanted = " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None)

    def parse(text: Any) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0) if kind is int else kind("nan")
            is_fine = False
        else:
            is_fine = (
                math.isfinite(value)
                and (least is None or value >= least)
                and (most is None or value <= most)
                and (above is None or value > above)
            )
        if not is_fine:
            raise WrongArgumentError(f"`{option}`: expected {noun} {wanted}{hint}, got {text!r}")
        return value

    return parse


def parse_threads(text: Any) -> int:
    """Read a number of threads; more than there are CPUs only take time from each other."""
    return number("--threads", int, least=1, most=os.cpu_count(), hint=", the CPUs here")(text)


def check_device(name: str | None) -> torch.device:
    """Return the device of that name, or the GPU where there is one.

    Raises:
        WrongArgumentError: there is no such device here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    is_here = device.type == "cpu" or (
        accelerator is not None and device.type == accelerator.type and (device.index or 0) < count
    )
    if not is_here:
        here = ["cpu", *(f"{accelerator.type}:{i}" for i in range(count) if accelerator)]
        names = " or ".join(f"`{found}`" for found in here)
        none = "" if count else ": torch finds no GPU here"
        raise WrongArgumentError(f"`--device`: expected {names}{none}, got {name!r}")
    return device


def check_forced_backend() -> str | None:
    """Return the backend that the environment forces; refuse an unknown one."""
    from bitnet_triton.runtime import forced_backend

    try:
        return forced_backend()
    except ValueError as error:
        raise WrongArgumentError(str(error)) from error


def check_backend(backend: Backend | None, device: torch.device) -> None:
    """Refuse a backend, forced by option or by environment, that cannot run on ``device``."""
    from bitnet_triton.runtime import backend_objection
    from bitnet_triton.runtime.select import ENVIRONMENT_VARIABLE

    name = backend.value if backend else check_forced_backend()
    objection = backend_objection(name, device) if name else None
    if objection is not None:
        source = "`--backend`" if backend else ENVIRONMENT_VARIABLE
        raise WrongArgumentError(
            f"{source}: expected a backend that runs on {device}, got {name}: {objection}"
        )
