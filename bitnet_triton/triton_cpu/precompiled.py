"""The headers that every kernel includes, parsed once for each compiler, its flags and the CPU.

GCC takes the precompiled form only if it is its own and of the same flags, and otherwise reads the
headers themselves, from a file beside it. Clang keeps to other rules; it reads the headers.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from bitnet_triton.triton_cpu import cache
from bitnet_triton.triton_cpu.errors import CompilerError
from bitnet_triton.triton_cpu.toolchain import Toolchain

INCLUDE = Path(__file__).parent / "include"

# What emit_kernel includes at the head of each translation unit, in this order
_HEADERS = '#include "tcpu.h"\n#include "byte_rows.h"\n#include "program.h"\n'
# What this process could not make, or what made a compiler fail
_refused: set[str] = set()


@functools.cache
def headers_identity() -> str:
    """Hash the C++ headers."""
    digest = hashlib.sha256()
    for path in sorted(INCLUDE.rglob("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def options(tools: Toolchain) -> tuple[str, ...]:
    """Return what lets ``tools`` take the headers as they were parsed before, or nothing.

    Raises:
        CacheError: the cache directory cannot be used, or another user could have written the file.
    """
    name = _name(tools)
    if name in _refused or not _takes(tools):
        return ()
    if not _is_there(name):
        with cache.locked("headers"):
            if not _is_there(name) and not _make(tools, name):
                return ()
    return ("-include", str(cache.directory() / name))


def discard(tools: Toolchain) -> None:
    """Remove the parsed headers, and do without them in this process."""
    name = _name(tools)
    _refused.add(name)
    (cache.directory() / f"{name}.gch").unlink(missing_ok=True)


def _name(tools: Toolchain) -> str:
    parts = repr((tools.identity, headers_identity(), _HEADERS))
    return f"headers-{hashlib.sha256(parts.encode()).hexdigest()[:32]}.h"


def _takes(tools: Toolchain) -> bool:
    """Tell whether to try: ccache, distcc and the like help no kernel that needs the file."""
    programs = [word for word in tools.command if not word.startswith("-")]
    return tools.kind == "gcc" and len(programs) == 1


def _is_there(name: str) -> bool:
    return cache.find(name) is not None and cache.find(f"{name}.gch") is not None


def _make(tools: Toolchain, name: str) -> bool:
    """Parse the headers into the cache; return whether the compiler can."""
    with cache.scratch() as folder:
        text, parsed = folder / "headers.h", folder / "headers.h.gch"
        text.write_text(_HEADERS)
        try:
            tools.run(f"-I{INCLUDE}", "-x", "c++-header", text, "-o", parsed, link=False)
        except CompilerError:
            _refused.add(name)
            return False
        cache.publish(text, name)
        cache.publish(parsed, f"{name}.gch")
        return True
