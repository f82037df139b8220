"""Describe the machine and the software; nothing that names a host, a user or a folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "transformers", "numpy")
# Instruction sets that integer and bf16 products depend on
_FLAGS = re.compile(
    r"avx2|avx_vnni\w*|avx512(f|bw|vl|_vnni|_vbmi|_bf16|_fp16|vbmi)|amx_\w+|asimddp|i8mm|bf16|sve2?"
)
_ASSUMED_CACHE_BYTES = 64 * 2**20


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}


def last_level_cache_bytes(device: torch.device | None = None) -> int | None:
    """Return the size of the largest cache of the CPU or of a GPU, None if it is not told."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()
        sizes.append(int(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit])
    return max(sizes, default=None)


def copies_beyond_cache(held_bytes: int, device: torch.device, factor: int = 4) -> int:
    """Return how many copies of a buffer together exceed the last-level cache ``factor`` times."""
    cache = last_level_cache_bytes(device) or _ASSUMED_CACHE_BYTES
    return max(2, -(-factor * cache // held_bytes))


def available_memory_bytes() -> int:
    """Return the memory that can be taken without swapping."""
    import psutil

    return psutil.virtual_memory().available


def load_average() -> float | None:
    """Return the load of the last minute, None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on: processor, memory, accelerator."""
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    description = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": [info.get("cpu family"), info.get("model")],
        "architecture": platform.machine(),
        "flags": sorted(flag for flag in set(flags) if _FLAGS.fullmatch(flag)),
        "logical_cpus": os.cpu_count(),
        "virtual": "hypervisor" in flags,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_bytes": memory,
        "system": platform.system(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description["gpu"] = properties.name
        description["gpu_memory_bytes"] = properties.total_memory
        description["gpu_cache_bytes"] = properties.L2_cache_size
    return description


def describe_software(device: torch.device) -> dict[str, Any]:
    """Return versions, the commit, and which backends of ours can run."""
    import bitnet_triton
    from bitnet_triton.runtime import BACKENDS, backend_objection, forced_backend

    versions = {"python": platform.python_version(), "bitnet_triton": bitnet_triton.__version__}
    versions |= {package: _version(package) for package in _PACKAGES}
    versions["torch"] = torch.__version__  # names the build too: +cpu, +cu130
    return {
        "versions": versions,
        "commit": _commit(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "forced_backend": forced_backend(),
        "backends": {name: backend_objection(name, device) or "available" for name in BACKENDS},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the short commit, with "+changes" when files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """Return how this run was started, without folders."""
    arguments = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    program = Path(sys.argv[0]).name
    return " ".join([program if program == "bitnet-triton" else "python -m bench", *arguments])
