"""The C++ compiler that kernels are built with: which one, with what flags, and for which CPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bitnet_triton.triton_cpu import cache
from bitnet_triton.triton_cpu.errors import CompilerError, ToolchainError

FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-fno-exceptions", "-fopenmp", "-shared", "-fPIC", "-pipe", "-w",
)  # fmt: skip

# What a kernel needs of the compiler and of the system: C++17, OpenMP, and loading the result
_CHECK = """
#include <cstdint>
template <class T> constexpr int kind() { if constexpr (sizeof(T) == 8) return 1; else return 2; }
extern "C" int tcpu_check(int n) {
  int sum = 0;
  #pragma omp parallel for num_threads(2) reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += i * kind<int64_t>();
  return sum;
}
"""

# The instruction sets that make a difference to kernels, as /proc/cpuinfo names them
_FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_int8", "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve",
)  # fmt: skip


@dataclass(frozen=True)
class Toolchain:
    """A compiler that has been tried, and how it is called.

    Attributes:
        command: the compiler, perhaps behind a launcher such as ccache.
        kind: "gcc" or "clang".
        version: the first line of what it says about itself.
        flags: everything before the file names.
        libraries: everything after them.
    """

    command: tuple[str, ...]
    kind: Literal["gcc", "clang"]
    version: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the compiler, its version, its flags and the CPU: part of every cache key."""
        text = repr((asdict(self), _stamp(self.command), cpu_identity()))
        return hashlib.sha256(text.encode()).hexdigest()

    def run(self, *arguments: str | Path, link: bool = True) -> None:
        """Call the compiler with its flags and ``arguments``, and with its libraries to ``link``.

        Raises:
            CompilerError: it failed.
        """
        libraries = self.libraries if link else ()
        _run([*self.command, *self.flags, *map(str, arguments), *libraries])


def _run(command: Sequence[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[:4000]
        raise CompilerError(f"{command[0]} failed with status {done.returncode}:\n{said}")


def toolchain() -> Toolchain:
    """Return the compiler to use; it has built and loaded a small program on this machine.

    ``TRITON_CPU_CXX`` names it and is final. Otherwise the first that works of ``CXX``, g++ and
    clang++. ``TRITON_CPU_MARCH`` replaces "native", ``TRITON_CPU_FLAGS`` adds flags.

    Raises:
        ToolchainError: none works.
    """
    return _toolchain(
        os.environ.get("TRITON_CPU_CXX", ""), os.environ.get("CXX", ""),
        os.environ.get("TRITON_CPU_MARCH") or "native", os.environ.get("TRITON_CPU_FLAGS", ""),
        os.environ.get("PATH", ""), cache.location(),
    )  # fmt: skip


@functools.cache
def _toolchain(
    forced: str, cxx: str, march: str, extra: str, path: str, location: Path
) -> Toolchain:
    objections = []
    for candidate in [forced] if forced else [cxx, "g++", "clang++"]:
        words = shlex.split(candidate)
        if not words:
            continue
        found = [word if word.startswith("-") else shutil.which(word, path=path) for word in words]
        command = tuple(word for word in found if word is not None)
        if len(command) < len(words):
            objections.append(f"{candidate}: not found")
            continue
        try:
            return _working(command, march, tuple(shlex.split(extra)), location)
        except (CompilerError, OSError) as error:
            objections.append(f"{candidate}: {error}")
    raise ToolchainError(
        "Triton kernels on a CPU need a C++ compiler with OpenMP: install g++, or clang++ with "
        f"libomp, or name one in TRITON_CPU_CXX. Tried {'; '.join(objections)}"
    )


def _working(
    command: tuple[str, ...], march: str, extra: tuple[str, ...], location: Path
) -> Toolchain:
    """Return the toolchain around ``command`` after it has built and run the check."""
    parts = (
        command,
        march,
        extra,
        FLAGS,
        _CHECK,
        _stamp(command),
        cpu_identity(),
        openmp_library(),
    )
    note = f"toolchain-{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.json"
    if (known := _from_note(cache.find(note))) is not None:
        return known
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    version = next(iter(said.stdout.splitlines()), "")
    kind: Literal["gcc", "clang"] = "clang" if "clang" in said.stdout.lower() else "gcc"
    tuned = _tuning(march)
    tunings = [tuned, []] if march == "native" else [tuned]
    choices = list(itertools.product(tunings, _libraries(kind, openmp_library())))
    for choice in choices:
        tuning, libraries = choice
        found = Toolchain(command, kind, version, (*FLAGS, *tuning, *extra), libraries)
        try:
            _check(found)
        except CompilerError:
            if choice is choices[-1]:
                raise
        else:
            break
    cache.write(note, json.dumps(asdict(found)).encode())
    return found


def _from_note(note: Path | None) -> Toolchain | None:
    """Read what an earlier process found out; None where there is nothing that makes sense."""
    if note is None:
        return None
    try:
        fields = json.loads(note.read_text())
        listed = {name: tuple(fields[name]) for name in ("command", "flags", "libraries")}
        return Toolchain(**{**fields, **listed})
    except (ValueError, KeyError, TypeError):
        return None


def _tuning(march: str) -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        # compilers prefer 256 bits on most CPUs that have 512, for fear of a lower clock
        return [f"-march={march}", "-mprefer-vector-width=512"]
    if platform.machine() == "aarch64":
        return [f"-mcpu={march}"]
    return [f"-march={march}"]


def _check(found: Toolchain) -> None:
    with cache.scratch() as folder:
        source, library = folder / "check.cpp", folder / "check.so"
        source.write_text(_CHECK)
        found.run(source, "-o", library)
        try:
            result = ctypes.CDLL(str(library)).tcpu_check(5)
        except OSError as error:
            raise CompilerError(f"what it builds cannot be loaded: {error}") from error
        if result != 10:
            raise CompilerError(f"a loop with OpenMP gives {result} in place of 10")


def openmp_library() -> str | None:
    """Return the path of the GNU OpenMP library that torch has brought into this process.

    Other packages may have brought theirs. None where torch takes that of the system.
    """
    import torch

    package = Path(torch.__file__).parent
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for path in (Path(line.split(maxsplit=5)[5]) for line in lines if "libgomp" in line):
        ours = path.is_relative_to(package) or path.is_relative_to(package.with_name("torch.libs"))
        if ours and path.name.startswith("libgomp"):
            return str(path)
    return None


def _libraries(kind: str, loaded: str | None) -> list[tuple[str, ...]]:
    """Return what to link with, so that kernels share the threads of torch, the best choice first.

    The loader takes a library that is there already for one of the same name. Where torch brings
    its own under a changed name (libgomp-a34b3233.so.1), that one is named, in place of libgomp.

    Kernels need nothing of C++'s library, and the linker reads it for longer than it takes over
    all else. Flags of the user may need it, or others that a compiler links by itself.
    """
    if kind != "gcc":
        return [()]
    last = ("-lm", "-lc", "-lgcc")
    if loaded is None or Path(loaded).name.startswith("libgomp.so"):
        return [("-nodefaultlibs", "-lgomp", *last), ()]
    openmp = ("-nodefaultlibs", loaded, f"-Wl,-rpath,{Path(loaded).parent}")
    return [(*openmp, *last), (*openmp, "-lstdc++", "-lgcc_s", *last)]


def _stamp(command: Sequence[str]) -> list[tuple[str, int, int]]:
    """Identify programs by path, size and time: an update changes them."""
    paths = [Path(word).resolve() for word in command if not word.startswith("-")]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


@functools.cache
def _cpu_fields() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    parts = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in parts}


@functools.cache
def cpu_identity() -> str:
    """Name the kind of CPU: code that was built for one kind is not loaded on another."""
    names = (
        "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
        "CPU implementer", "CPU part", "CPU variant", "Features", "isa", "cpu",
    )  # fmt: skip
    return repr((platform.machine(), [_cpu_fields().get(name) for name in names]))


def cpu_features() -> list[str]:
    """Return the instruction sets of this CPU that kernels can use."""
    fields = _cpu_fields()
    there = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    return [name for name in _FEATURES if name in there]
