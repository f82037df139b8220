"""Tiles that were measured on this machine: the file that holds them, and who may use them.

``python -m bench tune`` writes the file, nothing else does. A choice counts for the device, the
release of Triton and the source of the kernel that it was measured with; others stay in the file
and are passed over. A file that cannot be read as such is ignored as a whole, with a warning.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bitnet_triton.runtime.device import cpu_capability, triton_version
from bitnet_triton.runtime.tiles import kernel_of

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_KERNELS = Path(__file__).parents[1] / "kernels"


@dataclass(frozen=True)
class Choice:
    """Tiles that were the fastest.

    Attributes:
        device: its name.
        triton: the release.
        kernel: its name in the table of tiles.
        source: of the kernel, as a hash.
        size: the largest of its shape class in that table.
        tiles: by name.
    """

    device: str
    triton: str
    kernel: str
    source: str
    size: int
    tiles: Mapping[str, int]

    @property
    def place(self) -> tuple[str, str, str, int]:
        """What one file holds one choice for."""
        return self.device, self.triton, self.kernel, self.size


def cache_file() -> Path:
    """Return the file, in the user's own directory for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bitnet_triton" / "tiles.json"


@functools.cache
def device_name(device: torch.device) -> str:
    """Return what tiles depend on: the model of the GPU, or of the CPU with its vectors."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        model = found[1] if found else model
    except OSError:
        pass
    return f"{model} ({cpu_capability()})"


@functools.cache
def source_of(kernel: str) -> str | None:
    """Return a hash of what a kernel is made of, its folder and the common pieces; None: unknown.

    Args:
        kernel: its name in the table of tiles.
    """
    name = kernel_of(kernel)
    for path in sorted(_KERNELS.rglob("*.py")):
        if f"def _{name}_kernel(" in path.read_text(encoding="utf-8"):
            parts = sorted([*path.parent.glob("*.py"), *(_KERNELS / "common").glob("*.py")])
            return hashlib.sha256(b"\0".join(p.read_bytes() for p in parts)).hexdigest()[:16]
    return None


def make_choice(kernel: str, size: int, device: torch.device, tiles: Mapping[str, int]) -> Choice:
    """Return a choice for this machine, with the source that the kernel has now.

    Raises:
        ValueError: there is no such kernel.
    """
    source = source_of(kernel)
    if source is None:
        raise ValueError(f"`kernel`: no source of {kernel!r} was found")
    return Choice(device_name(device), triton_version() or "", kernel, source, size, dict(tiles))


def read_choices(path: Path) -> list[Choice]:
    """Return all choices in a file, those for other devices too; none if there is no file.

    Raises:
        ValueError: the file is damaged, or is none of ours.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"expected a file of format {_FORMAT}")
    try:
        choices = [Choice(**entry) for entry in data["choices"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected choices, got {error}") from None
    for choice in choices:
        _check(choice)
    return choices


def _check(choice: Choice) -> None:
    texts = (choice.device, choice.triton, choice.kernel, choice.source)
    if not all(isinstance(text, str) for text in texts) or type(choice.size) is not int:
        raise ValueError(f"expected names and a size, got {choice}")
    if not isinstance(choice.tiles, dict) or not choice.tiles:
        raise ValueError(f"expected tiles, got {choice.tiles!r}")
    for name, value in choice.tiles.items():
        if type(value) not in (int, bool) or value < 0 or value > 2**20:
            raise ValueError(f"expected a size for {name}, got {value!r}")
        if name.startswith(("BLOCK", "num_warps")) and (value < 1 or value & (value - 1)):
            raise ValueError(f"expected a power of two for {name}, got {value!r}")


def write_choices(path: Path, new: Sequence[Choice]) -> None:
    """Put choices into a file, in place of those for the same; readers see all of it or nothing."""
    try:
        known = read_choices(path)
    except ValueError as error:
        _LOG.warning("%s is replaced: %s", path, error)
        known = []
    merged = {choice.place: choice for choice in [*known, *new]}
    data = {"format": _FORMAT, "choices": [asdict(choice) for choice in merged.values()]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@functools.cache
def measured_tiles(device: str) -> dict[tuple[str, int], dict[str, int]]:
    """Return what was measured on this machine, by kernel and size; read once a process.

    Args:
        device: "cpu", or "cuda" with its index: strings are hashed faster than devices.
    """
    path = cache_file()
    try:
        choices = read_choices(path)
    except (OSError, ValueError) as error:
        _LOG.warning("%s is ignored, as if nothing had been tuned: %s", path, error)
        return {}
    here = (device_name(torch.device(device)), triton_version()) if choices else ()
    return {
        (choice.kernel, choice.size): dict(choice.tiles)
        for choice in choices
        if (choice.device, choice.triton) == here and choice.source == source_of(choice.kernel)
    }
