"""From C++ source to a loaded library: look in the cache, else compile."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import threading
from pathlib import Path

from bitnet_triton.triton_cpu import cache, compat, precompiled
from bitnet_triton.triton_cpu.errors import CacheError, CompilerError
from bitnet_triton.triton_cpu.precompiled import INCLUDE, headers_identity
from bitnet_triton.triton_cpu.toolchain import Toolchain, toolchain

PACKAGE = Path(__file__).parent

_KEY_LENGTH = 64
_loaded: dict[str, ctypes.CDLL] = {}
_loading = threading.Lock()


@functools.cache
def sources_identity() -> str:
    """Hash our own Python and C++ files: code that another version made is not used."""
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *INCLUDE.rglob("*.h")]):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build(source: str, name: str, *flags: str) -> bytes:
    """Compile a kernel, or take it from the cache; return the shared library, ended by its key.

    Args:
        source: C++.
        name: of the kernel, for errors and dumps.
        *flags: for the compiler, after those of every kernel.

    Raises:
        CompilerError: the compiler refused the source.
        ToolchainError: there is no compiler.
        CacheError: the cache directory cannot be used.
    """
    dump(source, name)
    tools = toolchain()
    parts = (source, flags, headers_identity(), tools.identity, compat.version())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    assert len(key) == _KEY_LENGTH
    if (known := _cached(key)) is not None:
        return known  # and wait for nobody who compiles another kernel
    with cache.locked(key[:2]):
        return _cached(key) or _compile(tools, source, name, key, flags).read_bytes()


def _cached(key: str) -> bytes | None:
    """Return the library of ``key``; None where there is none, or only half of one."""
    path = cache.find(f"{key}.so")
    binary = path.read_bytes() if path else b""
    return binary if binary.endswith(key.encode()) else None


def _compile(tools: Toolchain, source: str, name: str, key: str, flags: tuple[str, ...]) -> Path:
    with cache.scratch() as folder:
        text, library = folder / "kernel.cpp", folder / "kernel.so"
        text.write_text(source)
        try:
            _call(tools, flags, text, library)
        except CompilerError as error:
            raise CompilerError(
                f"kernel {name}: {error}\nTRITON_CPU_DUMP=<folder> keeps the C++ source"
            ) from None
        with library.open("ab") as file:  # what follows an ELF file is no concern of the loader
            file.write(key.encode())
        return cache.publish(library, f"{key}.so")


def _call(tools: Toolchain, flags: tuple[str, ...], text: Path, library: Path) -> None:
    """Call the compiler, with headers that were parsed before where they were with its flags."""
    rest: tuple[str | Path, ...] = (*flags, f"-I{INCLUDE}", text, "-o", library)
    parsed = () if flags else precompiled.options(tools)
    if parsed:
        try:
            return tools.run(*parsed, *rest)
        except CompilerError:
            pass  # for damaged headers, or for the kernel's own fault, which shows again
    tools.run(*rest)
    if parsed:
        precompiled.discard(tools)
    return None


def load(binary: bytes) -> ctypes.CDLL:
    """Load what ``build`` returned, once for each process, from its file in the cache."""
    key = binary[-_KEY_LENGTH:].decode(errors="replace")
    library = _loaded.get(key)
    if library is not None:
        return library
    if not re.fullmatch(rf"[0-9a-f]{{{_KEY_LENGTH}}}", key):
        raise CacheError("a compiled kernel in Triton's cache is damaged; delete the cache")
    with _loading:
        if key not in _loaded:
            path = cache.directory() / f"{key}.so"
            if _cached(key) is None:
                cache.write(path.name, binary)
            _loaded[key] = ctypes.CDLL(str(path))
        return _loaded[key]


def dump(source: str, name: str) -> None:
    """Write the C++ of a kernel where ``TRITON_CPU_DUMP`` says."""
    folder = os.environ.get("TRITON_CPU_DUMP")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        safe = re.sub(r"\W", "_", name)[:100]
        (Path(folder) / f"{safe}-{hashlib.sha256(source.encode()).hexdigest()[:8]}.cpp").write_text(
            source
        )
