"""Headers that are parsed once: the same code, and kernels without them where they do not help."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

import bitnet_triton.triton_cpu as triton_cpu
from bitnet_triton.triton_cpu import build, cache, precompiled, toolchain

HEADERS = '#include "tcpu.h"\n#include "byte_rows.h"\n#include "program.h"\n'
SOURCE = (
    HEADERS
    + """
using namespace tcpu;
extern "C" int answer() { return %d; }
extern "C" int run(int n, float* x) {
  return run_grid<4096, false>(n, 1, 1, 2, [=](char* arena, int i, int, int) {
    for (int k = 0; k < 64; ++k) ((float*)arena)[k] = m_exp(x[64 * i + k]);
    for (int k = 0; k < 64; ++k) x[64 * i + k] = ((float*)arena)[63 - k];
  });
}
"""
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CPU_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(precompiled, "_refused", set())
    for name in ("TRITON_CPU_CXX", "CXX", "TRITON_CPU_FLAGS", "TRITON_CPU_MARCH"):
        monkeypatch.delenv(name, raising=False)
    if toolchain.toolchain().kind != "gcc":
        pytest.skip("clang reads the headers for every kernel")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Return ``compiler(text)``: from then on bash runs ``text`` before each call of g++.

    The result is a function that returns the words of the calls since it was last asked.
    """

    def write(text=""):
        path, log = tmp_path / "compiler", tmp_path / "calls"
        path.write_text(
            f'#!/bin/bash\necho "$@" >> {log}\n{text}\nexec {shutil.which("g++")} "$@"\n'
        )
        path.chmod(0o755)
        monkeypatch.setenv("TRITON_CPU_CXX", str(path))
        toolchain.toolchain()

        def calls():
            lines = log.read_text().splitlines()
            log.write_text("")
            return [line.split() for line in lines]

        calls()
        return calls

    return write


def parsed_headers():
    return sorted(cache.directory().glob("headers-*.gch"))


def answer(number):
    return build.load(build.build(SOURCE % number, "answer")).answer()


def test_the_object_is_the_same_and_the_parsed_headers_are_read(tmp_path):
    tools = toolchain.toolchain()
    source = tmp_path / "kernel.cpp"
    source.write_text(SOURCE % 1)
    command = [*tools.command, *tools.flags, "-H", f"-I{build.INCLUDE}", "-c", source, "-o"]
    read = {}
    for options in ((), precompiled.options(tools)):
        output = tmp_path / f"{len(options)}.o"
        done = subprocess.run(
            [*command, output, *options], check=True, capture_output=True, text=True
        )
        read[output.read_bytes()] = done.stderr
    assert len(read) == 1
    (file,) = parsed_headers()
    assert f"! {file}" in next(iter(read.values()))  # GCC marks what it has taken so


def test_they_are_made_once(compiler):
    calls = compiler()
    assert [answer(number) for number in (1, 2, 3)] == [1, 2, 3]
    made = ["c++-header" in words for words in calls()]
    assert made == [True, False, False, False]


def test_many_processes_at_once_make_them_once(compiler, tmp_path):
    calls = compiler("[[ $* == *c++-header* ]] && sleep 0.5")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom bitnet_triton.triton_cpu import build\n"
        f"source = {SOURCE!r} % int(sys.argv[1])\n"
        "print(build.load(build.build(source, 'answer')).answer())\n"
    )
    processes = [
        subprocess.Popen([sys.executable, program, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    assert [int(process.communicate(timeout=120)[0]) for process in processes] == [0, 1, 2]
    assert sum("c++-header" in words for words in calls()) == 1
    assert not list(cache.directory().glob("tmp-*"))


@pytest.mark.parametrize("damage", ["nothing", "half", "other bytes", "end"])
def test_damaged_headers_are_done_without(damage):
    assert answer(1) == 1
    (file,) = parsed_headers()
    whole = file.read_bytes()
    half = len(whole) // 2
    file.write_bytes(
        {
            "nothing": b"",
            "half": whole[:half],
            "other bytes": bytes(len(whole)),
            "end": whole[:-1000],
        }[damage]
    )
    assert [answer(number) for number in (2, 3)] == [2, 3]


def test_headers_that_make_the_compiler_fail_are_removed(compiler):
    assert answer(1) == 1
    calls = compiler("[[ $* == *-include* ]] && exit 1")
    assert [answer(number) for number in (2, 3)] == [2, 3]
    # made; tried and done without; not tried again
    assert ["-include" in words for words in calls()] == [False, True, False, False]
    assert len(parsed_headers()) == 1  # those of the first compiler


def test_a_kernel_at_fault_says_so_and_leaves_the_headers(compiler):
    calls = compiler()
    with pytest.raises(triton_cpu.CompilerError, match=r"(?s)kernel broken: .*not_declared"):
        build.build(HEADERS + "int f() { return not_declared; }", "broken")
    assert len(parsed_headers()) == 1
    calls()
    assert answer(1) == 1
    assert ["-include" in words for words in calls()] == [True]


def test_headers_that_were_deleted_are_made_again():
    assert answer(1) == 1
    (before,) = parsed_headers()
    before.unlink()
    assert answer(2) == 2
    assert parsed_headers() == [before]
    before.with_suffix("").unlink()
    assert answer(3) == 3


def test_a_compiler_that_parses_no_headers_is_used_without(compiler):
    calls = compiler("[[ $* == *c++-header* ]] && exit 1")
    assert [answer(number) for number in (1, 2)] == [1, 2]
    assert ["c++-header" in words for words in calls()] == [True, False, False]  # tried once
    assert not parsed_headers()


def test_other_flags_have_their_own(monkeypatch):
    assert answer(1) == 1
    monkeypatch.setenv("TRITON_CPU_FLAGS", "-DSOMETHING=1")
    assert answer(2) == 2
    assert len(parsed_headers()) == 2


def test_a_kernel_with_flags_of_its_own_reads_the_headers(compiler):
    calls = compiler()
    build.build(SOURCE % 1, "answer", "-ffp-contract=off")
    assert ["-include" in words for words in calls()] == [False]
    assert not parsed_headers()


def test_a_launcher_gets_kernels_that_need_no_other_file(monkeypatch, compiler, tmp_path):
    calls = compiler()
    monkeypatch.setenv("TRITON_CPU_CXX", f"{shutil.which('env')} {tmp_path / 'compiler'}")
    toolchain.toolchain()
    calls()
    assert answer(1) == 1
    assert ["-include" in words for words in calls()] == [False]


def test_headers_that_others_may_write_are_refused():
    assert answer(1) == 1
    (file,) = parsed_headers()
    for path in (file, file.with_suffix("")):
        path.chmod(0o666)
        with pytest.raises(triton_cpu.CacheError, match="it is writable by everybody"):
            answer(2)
        path.chmod(0o600)
    assert answer(2) == 2
