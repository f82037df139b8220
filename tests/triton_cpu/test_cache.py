"""The cache on disk: what it is keyed by, whom it trusts, and many processes at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import bitnet_triton.triton_cpu as triton_cpu
from bitnet_triton.triton_cpu import build, cache, toolchain

SOURCE = '#include "tcpu.h"\nextern "C" int answer() { return %d; }\n'
ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="gives files away, which only root can")

PROGRAM = """
import sys, torch, triton, triton.language as tl
import bitnet_triton.triton_cpu as triton_cpu

@triton.jit
def scale_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < n) * 3, mask=i < n)

x = torch.ones(100)
triton_cpu.launch(scale_kernel, (4,))(x, 100, BLOCK=32)
assert (x == 3).all(), x
print("fine")
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    path = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CPU_CACHE_DIR", str(path))
    monkeypatch.setattr(build, "_loaded", {})
    return path


@pytest.fixture
def program(tmp_path):
    """Return ``program()``: starts a process that compiles and runs a kernel, with empty caches."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    compiler = tmp_path / "compiler"
    log = tmp_path / "calls"
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TRITON_CPU_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_CPU_CXX": str(compiler),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    write_compiler(compiler, log)
    started = []

    def start(**more):
        process = subprocess.Popen(
            [sys.executable, file], env=environment | more, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    start.compiler, start.log = compiler, log
    yield start
    for process in started:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def write_compiler(path, log, before=""):
    """Write a compiler that notes each kernel that it is given."""
    path.write_text(
        f'#!/bin/bash\n[[ $* == *kernel.cpp* ]] && echo kernel >> {log}\n{before}\nexec g++ "$@"\n'
    )
    path.chmod(0o755)


def finished(process):
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # faulthandler says where it is
        pytest.fail(f"the process hangs:\n{process.communicate()[0]}")
    return process.returncode, output.strip()


def test_second_process_compiles_nothing(program):
    assert finished(program()) == (0, "fine")
    assert program.log.read_text() == "kernel\n"
    assert finished(program()) == (0, "fine")
    assert program.log.read_text() == "kernel\n"


def test_lost_files_are_made_again(program, tmp_path):
    assert finished(program()) == (0, "fine")
    for file in (tmp_path / "cache").glob("*.so"):
        file.unlink()  # Triton's cache still knows the kernel
    assert finished(program()) == (0, "fine")
    for file in (tmp_path / "triton").rglob("*"):
        if file.is_file() and "triton_cpu" not in str(file):
            file.unlink()
    assert finished(program()) == (0, "fine")


def test_many_processes_at_once_compile_once(program, tmp_path):
    processes = [program() for _ in range(6)]
    assert [finished(process) for process in processes] == [(0, "fine")] * 6
    assert program.log.read_text() == "kernel\n"
    assert not list((tmp_path / "cache").glob("tmp-*"))


def test_killed_process_leaves_nothing_that_hurts(program, tmp_path):
    write_compiler(program.compiler, program.log, "[[ $* == *kernel.cpp* ]] && sleep 60")
    killed = program()
    deadline = time.monotonic() + 60
    while not program.log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    waiting = program()  # for the lock of the first
    time.sleep(1)
    write_compiler(program.compiler, program.log)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list((tmp_path / "cache").glob("tmp-*"))
    assert finished(waiting) == (0, "fine")


def test_half_a_file_is_compiled_again(folder):
    binary = build.build(SOURCE % 1, "answer")
    (file,) = folder.glob("*.so")
    file.write_bytes(binary[: len(binary) // 2])
    assert build.build(SOURCE % 1, "answer") == binary
    assert build.load(binary).answer() == 1


def test_binary_from_elsewhere_is_entered(folder):
    binary = build.build(SOURCE % 1, "answer")
    for file in folder.glob("*.so"):
        file.unlink()
    assert build.load(binary).answer() == 1
    assert len(list(folder.glob("*.so"))) == 1


def test_damaged_binary_is_refused(folder):
    with pytest.raises(triton_cpu.CacheError, match="damaged"):
        build.load(b"\x7fELF" + bytes(100))


def test_library_is_loaded_once_and_from_its_file(folder):
    binary = build.build(SOURCE % 1, "answer")
    library = build.load(binary)
    assert build.load(binary) is library
    assert library._name.startswith(str(folder))
    assert library._name in Path("/proc/self/maps").read_text()


class TestKey:
    """Everything that decides about the code is in the key."""

    @pytest.fixture(autouse=True)
    def _built(self, folder):
        build.build(SOURCE % 1, "answer")
        self.folder = folder

    def builds(self, source=SOURCE % 1):
        before = len(list(self.folder.glob("*.so")))
        build.build(source, "answer")
        return len(list(self.folder.glob("*.so"))) - before

    def test_same_source_is_found(self):
        assert self.builds() == 0

    def test_source(self):
        assert self.builds(SOURCE % 2) == 1

    def test_headers(self, monkeypatch):
        monkeypatch.setattr(build, "headers_identity", lambda: "changed")
        assert self.builds() == 1

    def test_version_of_triton(self, monkeypatch):
        monkeypatch.setattr(build.compat, "version", lambda: "3.99.0")
        assert self.builds() == 1

    def test_flags(self, monkeypatch):
        monkeypatch.setenv("TRITON_CPU_FLAGS", "-DSOMETHING")
        assert self.builds() == 1

    def test_cpu(self, monkeypatch):
        monkeypatch.setattr(toolchain, "cpu_identity", lambda: "another CPU")
        toolchain._toolchain.cache_clear()
        assert self.builds() == 1
        toolchain._toolchain.cache_clear()

    def test_compiler(self, monkeypatch, tmp_path):
        write_compiler(tmp_path / "g++", tmp_path / "log")
        monkeypatch.setenv("TRITON_CPU_CXX", str(tmp_path / "g++"))
        assert self.builds() == 1


def test_tritons_key_covers_our_sources_compiler_and_cpu(folder, monkeypatch):
    from bitnet_triton.triton_cpu import compiler

    backend = compiler.CPUBackend(compiler.TARGET)
    keys = {backend.hash()}
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "sources_identity", lambda: "changed")
        keys.add(backend.hash())
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_CPU_FLAGS", "-DSOMETHING")
        keys.add(backend.hash())
    assert len(keys) == 3
    assert backend.hash() in keys


def test_options_that_decide_are_in_tritons_key(monkeypatch):
    from bitnet_triton.triton_cpu.compiler import TARGET, CPUBackend

    backend = CPUBackend(TARGET)
    plain = backend.parse_options({})
    assert backend.parse_options({"num_warps": 8, "num_stages": 3}).hash() == plain.hash()
    assert backend.parse_options({"debug": True}).hash() != plain.hash()
    assert backend.parse_options({"assume_disjoint": False}).hash() != plain.hash()
    monkeypatch.setenv("TRITON_CPU_MATERIALISE", "1")
    assert backend.parse_options({}).hash() != plain.hash()


class TestTrust:
    """Nothing is loaded that another user could have written."""

    def test_directory_and_files_are_for_the_user_alone(self, folder):
        build.build(SOURCE % 1, "answer")
        assert folder.stat().st_mode & 0o777 == 0o700
        for path in folder.rglob("*"):
            assert path.stat().st_mode & 0o077 == 0

    @pytest.mark.parametrize("mode", [0o777, 0o707, 0o1777])
    def test_directory_that_others_may_write_is_refused(self, folder, mode):
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(triton_cpu.CacheError, match=f"{folder}: it is writable by everybody"):
            cache.directory()

    def test_file_that_others_may_write_is_refused(self, folder):
        build.build(SOURCE % 1, "answer")
        (file,) = folder.glob("*.so")
        file.chmod(0o666)
        with pytest.raises(triton_cpu.CacheError, match="it is writable by everybody"):
            build.build(SOURCE % 1, "answer")

    @ROOT_ONLY
    def test_file_of_another_user_is_refused(self, folder):
        binary = build.build(SOURCE % 1, "answer")
        (file,) = folder.glob("*.so")
        os.chown(file, 1234, -1)
        with pytest.raises(triton_cpu.CacheError, match="it belongs to user 1234"):
            build.load(binary)

    @ROOT_ONLY
    def test_directory_of_another_user_is_refused(self, folder):
        folder.mkdir()
        os.chown(folder, 1234, -1)
        with pytest.raises(
            triton_cpu.CacheError, match=r"it belongs to user 1234.*TRITON_CPU_CACHE_DIR"
        ):
            cache.directory()

    @ROOT_ONLY
    def test_directory_that_a_group_may_write_is_refused(self, folder):
        folder.mkdir()
        os.chown(folder, -1, 1234)
        folder.chmod(0o770)
        with pytest.raises(triton_cpu.CacheError, match="it is writable by group 1234"):
            cache.directory()

    def test_symbolic_link_is_refused(self, folder, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(triton_cpu.CacheError, match="symbolic link"):
            cache.directory()

    def test_parent_that_others_may_write_is_refused(self, monkeypatch, tmp_path):
        parent = tmp_path / "shared"
        parent.mkdir()
        parent.chmod(0o777)
        monkeypatch.setenv("TRITON_CPU_CACHE_DIR", str(parent / "cache"))
        with pytest.raises(
            triton_cpu.CacheError, match="in a directory that is writable by everybody"
        ):
            cache.directory()

    def test_parent_with_sticky_bit_is_fine(self, monkeypatch, tmp_path):
        parent = tmp_path / "shared"
        parent.mkdir()
        parent.chmod(0o1777)  # as /tmp
        monkeypatch.setenv("TRITON_CPU_CACHE_DIR", str(parent / "cache"))
        assert cache.directory() == parent / "cache"

    def test_cache_of_triton_that_others_may_write_is_not_read(self, program, tmp_path):
        assert finished(program()) == (0, "fine")
        (tmp_path / "triton").chmod(0o777)
        status, output = finished(program())
        assert status != 0
        assert "it is writable by everybody" in output

    def test_directory_that_cannot_be_written_is_an_error(self, monkeypatch):
        monkeypatch.setenv("TRITON_CPU_CACHE_DIR", "/proc/nowhere/cache")
        with pytest.raises(triton_cpu.CacheError, match="cannot write to the cache directory"):
            cache.directory()


def test_default_is_inside_the_cache_of_triton(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CPU_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert cache.location() == tmp_path / f"triton_cpu-{os.getuid()}"


def test_directory_that_was_deleted_meanwhile_is_made_again(folder):
    build.build(SOURCE % 1, "answer")
    shutil.rmtree(folder)
    assert build.load(build.build(SOURCE % 2, "answer")).answer() == 2


def test_size_counts_all_files(folder):
    assert cache.size() == 0
    cache.write("one", bytes(1000))
    assert cache.size() >= 1000


def test_leftovers_of_killed_processes_are_removed_after_a_day(folder):
    old, fresh = cache.directory() / "tmp-old", cache.directory() / "tmp-new"
    for path in (old, fresh):
        path.mkdir()
    os.utime(old, (0, 0))
    cache._sweep.cache_clear()
    cache.write("one", b"")
    assert not old.exists()
    assert fresh.exists()


def test_lock_excludes_another_process(folder):
    code = f"""
    import os, sys, time
    os.environ["TRITON_CPU_CACHE_DIR"] = {str(folder)!r}
    from bitnet_triton.triton_cpu import cache
    with cache.locked("x"):
        print("locked", flush=True)
        time.sleep(0.5)
        open({str(folder / "done")!r}, "w").close()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "locked\n"
    with cache.locked("x"):
        assert (folder / "done").exists()
    assert child.wait(10) == 0
    child.stdout.close()
