"""Files that outlive a process: compiled kernels, and what was found out about the compiler.

Code from here is loaded into the process, so the directory and its files must belong to the user
and be writable by nobody else. Files appear whole or not at all: they are written under another
name and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import grp
import os
import pwd
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bitnet_triton.triton_cpu import compat
from bitnet_triton.triton_cpu.errors import CacheError

ENVIRONMENT_VARIABLE = "TRITON_CPU_CACHE_DIR"
_STALE_SECONDS = 24 * 3600


def location() -> Path:
    """Return where the cache is: ``TRITON_CPU_CACHE_DIR``, or a folder in Triton's own cache."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(_triton_cache()).absolute() / f"triton_cpu-{os.getuid()}"


def _triton_cache() -> str:
    """Return Triton's cache directory, without importing Triton where the environment names it."""
    return os.environ.get("TRITON_CACHE_DIR") or compat.cache_directory()


def directory() -> Path:
    """Create the cache directory where needed, and return it.

    Raises:
        CacheError: it cannot be created or written, or another user could write to it.
    """
    path = location()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        _try_to_write(path)
    except OSError as error:
        raise CacheError(
            f"cannot write to the cache directory {path} ({error.strerror}); "
            f"{ENVIRONMENT_VARIABLE} names another one"
        ) from error
    refuse_foreign(path)
    return path


@functools.cache
def _try_to_write(path: Path) -> None:
    with tempfile.TemporaryFile(dir=path):
        pass


def refuse_foreign(path: Path) -> None:
    """Raise where another user could have written ``path``, or could exchange it.

    Raises:
        CacheError: with what is wrong and what to do.
    """
    wrong = _foreign(path.lstat())
    if wrong is None and path.is_dir():
        # whoever may write to the parent can exchange a directory, unless the sticky bit is set
        parent = path.resolve().parent.stat()
        if not parent.st_mode & stat.S_ISVTX and (found := _foreign(parent)) is not None:
            wrong = f"in a directory that {found.removeprefix('it ')}"
    if wrong is not None:
        raise CacheError(
            f"will not load code from {path}: {wrong}; "
            f"{ENVIRONMENT_VARIABLE} or TRITON_CACHE_DIR names another directory"
        )


def _foreign(info: os.stat_result) -> str | None:
    if stat.S_ISLNK(info.st_mode):
        return "it is a symbolic link"
    if info.st_uid not in (0, os.getuid()):
        return f"it belongs to user {info.st_uid}"
    if info.st_mode & stat.S_IWOTH:
        return "it is writable by everybody"
    if info.st_mode & stat.S_IWGRP and not _private_group(info.st_gid):
        return f"it is writable by group {info.st_gid}"
    return None


@functools.cache
def _private_group(gid: int) -> bool:
    """Tell whether the user is alone in a group, as in the one that many systems make for each."""
    try:
        user = pwd.getpwuid(os.getuid())
        return user.pw_gid == gid and set(grp.getgrgid(gid).gr_mem) <= {user.pw_name}
    except KeyError:
        return False


def find(name: str) -> Path | None:
    """Return the file ``name`` of the cache, or None where there is none.

    Raises:
        CacheError: another user could have written it.
    """
    path = directory() / name
    try:
        refuse_foreign(path)
    except FileNotFoundError:
        return None
    return path


def publish(temporary: Path, name: str) -> Path:
    """Move a finished file to its place in the cache; the last writer wins."""
    path = directory() / name
    temporary.chmod(0o600)
    temporary.replace(path)
    return path


def write(name: str, content: bytes) -> Path:
    """Write a whole file of the cache."""
    with scratch() as folder:
        (folder / "file").write_bytes(content)
        return publish(folder / "file", name)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a private temporary directory on the cache's file system; remove it afterwards."""
    _sweep(directory())
    folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=directory()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _sweep(root: Path) -> None:
    """Remove what processes that were killed have left behind."""
    for folder in root.glob("tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process or thread at a time do a piece of work.

    The system frees the lock of a process that dies. Without locks on this file system, everybody
    does the work, which is as right and only slower.

    Args:
        name: one of few, because the files of the locks stay: a lock whose file is removed can be
            taken twice.
    """
    path = directory() / f"lock-{name}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def size() -> int:
    """Return how many bytes the cache holds."""
    total = 0
    for file in location().rglob("*"):
        with contextlib.suppress(OSError):
            total += file.lstat().st_size
    return total
