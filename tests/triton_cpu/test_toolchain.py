"""Finding a C++ compiler, and saying so when there is none."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

import bitnet_triton.triton_cpu as triton_cpu
from bitnet_triton.triton_cpu import build, cache, toolchain

SOURCE = 'extern "C" int tcpu_launch(int, int, int, int, const void*) { return 7; }\n'


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CPU_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("TRITON_CPU_CXX", "CXX", "TRITON_CPU_FLAGS", "TRITON_CPU_MARCH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def script(tmp_path):
    """Return ``script(text)``: the path of a program with this text, in bash."""

    def write(text, name="compiler"):
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return write


@pytest.fixture
def counted(script, tmp_path):
    """Return a compiler that writes down its calls, and a function that counts and forgets them."""
    log = tmp_path / "calls"
    path = script(f'echo "$@" >> {log}; exec {shutil.which("g++")} "$@"')

    def calls():
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        return lines

    return path, calls


def test_found_compiler_works():
    found = toolchain.toolchain()
    assert found.kind in ("gcc", "clang")
    assert found.version
    assert any(feature in found.flags for feature in ("-march=native", "-mcpu=native"))
    library = build.load(build.build(SOURCE, "seven"))
    assert library.tcpu_launch(0, 0, 0, 0, None) == 7


def test_fast_math_that_breaks_nan_is_off():
    assert not {"-ffast-math", "-Ofast", "-ffinite-math-only"} & set(toolchain.toolchain().flags)


def test_named_compiler_is_final(monkeypatch, script):
    monkeypatch.setenv("TRITON_CPU_CXX", "no-such-compiler")
    with pytest.raises(triton_cpu.ToolchainError, match=r"Tried no-such-compiler: not found$"):
        toolchain.toolchain()


def test_broken_cxx_is_passed_over(monkeypatch, script):
    monkeypatch.setenv("CXX", script("echo this is no compiler >&2; exit 1"))
    assert toolchain.toolchain().command == (shutil.which("g++"),)


def test_cxx_may_hold_a_launcher_and_options(monkeypatch, script):
    launcher = script('exec "$@"', "ccache")
    monkeypatch.setenv("CXX", f"{launcher} g++ -m64")
    assert toolchain.toolchain().command == (launcher, shutil.which("g++"), "-m64")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo cannot find omp.h >&2; exit 1", "cannot find omp.h"),
        ("exit 0", "cannot be loaded"),
    ],
)
def test_compiler_that_fails_is_named_with_its_words(monkeypatch, script, text, message):
    path = script(text)
    monkeypatch.setenv("TRITON_CPU_CXX", path)
    with pytest.raises(triton_cpu.ToolchainError, match=f"(?s)install g\\+\\+.*{path}.*{message}"):
        toolchain.toolchain()


def test_objection_says_that_there_is_no_compiler(monkeypatch):
    monkeypatch.setenv("TRITON_CPU_CXX", "no-such-compiler")
    triton_cpu.objection.cache_clear()
    try:
        assert "need a C++ compiler with OpenMP" in triton_cpu.objection()
    finally:
        triton_cpu.objection.cache_clear()


def test_compiler_is_tried_once_for_all_processes(monkeypatch, counted):
    path, calls = counted
    monkeypatch.setenv("TRITON_CPU_CXX", path)
    found = toolchain.toolchain()
    assert calls()
    toolchain._toolchain.cache_clear()  # as another process would begin
    assert toolchain.toolchain() == found
    assert not calls()


def test_damaged_note_is_written_again():
    found = toolchain.toolchain()
    (note,) = cache.directory().glob("toolchain-*.json")
    for text in ("", "{}", "[1]"):
        note.write_text(text)
        toolchain._toolchain.cache_clear()
        assert toolchain.toolchain() == found
        assert len(note.read_text()) > 20


def test_replaced_compiler_is_tried_again(monkeypatch, counted):
    path, calls = counted
    monkeypatch.setenv("TRITON_CPU_CXX", path)
    before = toolchain.toolchain().identity
    calls()
    with open(path, "a") as file:
        file.write("# another version\n")
    toolchain._toolchain.cache_clear()
    assert toolchain.toolchain().identity != before
    assert calls()


def test_flags_and_march_of_the_user_are_used(monkeypatch):
    plain = toolchain.toolchain()
    monkeypatch.setenv("TRITON_CPU_FLAGS", "-DEXTRA=1 -O1")
    monkeypatch.setenv("TRITON_CPU_MARCH", "x86-64-v3")
    if toolchain.platform.machine() != "x86_64":
        pytest.skip("names an x86 level")
    tuned = toolchain.toolchain()
    assert tuned.flags[-2:] == ("-DEXTRA=1", "-O1")
    assert "-march=x86-64-v3" in tuned.flags
    assert "-march=native" not in tuned.flags
    assert tuned.identity != plain.identity


def test_impossible_march_is_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_CPU_MARCH", "abacus")
    with pytest.raises(triton_cpu.ToolchainError, match="abacus"):
        toolchain.toolchain()


def test_compiler_that_does_not_know_native_is_used_without(monkeypatch, script):
    path = script(
        'for flag in "$@"; do [[ $flag == -m*=native ]] && { echo unknown >&2; exit 1; }; done\n'
        f'exec {shutil.which("g++")} "$@"'
    )
    monkeypatch.setenv("TRITON_CPU_CXX", path)
    assert not [flag for flag in toolchain.toolchain().flags if "native" in flag]


def test_refused_kernel_is_an_error_with_the_words_of_the_compiler():
    with pytest.raises(triton_cpu.CompilerError, match=r"(?s)kernel broken: .*not_declared"):
        build.build("int f() { return not_declared; }", "broken")


def test_source_is_dumped_where_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CPU_DUMP", str(tmp_path / "dump"))
    build.build(SOURCE, "seven")
    (file,) = (tmp_path / "dump").iterdir()
    assert file.name.startswith("seven-")
    assert file.read_text() == SOURCE


def test_cpu_has_the_features_that_torch_sees():
    import torch

    features = toolchain.cpu_features()
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("avx2" in features) == (capability in ("AVX2", "AVX512"))
    assert capability != "AVX512" or "avx512f" in features


def test_other_cpu_has_another_identity(monkeypatch):
    before = toolchain.toolchain().identity
    monkeypatch.setattr(toolchain, "cpu_identity", lambda: "another CPU")
    toolchain._toolchain.cache_clear()
    assert toolchain.toolchain().identity != before
    toolchain._toolchain.cache_clear()


def test_kernels_share_the_threads_of_a_torch_with_its_own_name_for_libgomp(monkeypatch, tmp_path):
    """Wheels of torch bring libgomp-a34b3233.so.1, for instance."""
    original = toolchain.openmp_library()
    assert original is not None
    renamed = tmp_path / "libgomp-so.1"
    renamed.write_bytes(Path(original).read_bytes().replace(b"libgomp.so.1", b"libgomp-so.1"))
    monkeypatch.setattr(toolchain, "openmp_library", lambda: str(renamed))
    toolchain._toolchain.cache_clear()
    try:
        assert str(renamed) in toolchain.toolchain().libraries  # its check has run a loop
        build.build('#include "tcpu.h"\n' + SOURCE.replace("return 7;", LOOP), "loop")
    finally:
        toolchain._toolchain.cache_clear()
    (library,) = cache.directory().glob("*.so")
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    needed = [line for line in said.stdout.splitlines() if "NEEDED" in line and "gomp" in line]
    assert len(needed) == 1
    assert "libgomp-so.1" in needed[0]


LOOP = """
  int sum = 0;
  #pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < 8; ++i) sum += i;
  return sum;
"""


def test_kernels_are_linked_without_the_library_of_cpp(monkeypatch):
    monkeypatch.setenv("TRITON_CPU_FLAGS", "-Wl,--no-as-needed")  # what is named is needed
    if toolchain.toolchain().kind != "gcc":
        pytest.skip("clang links what it links by itself")
    build.build('#include "tcpu.h"\n' + SOURCE.replace("return 7;", LOOP), "loop")
    (library,) = cache.directory().glob("*.so")
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    needed = [line for line in said.stdout.splitlines() if "NEEDED" in line]
    assert [line for line in needed if "gomp" in line]
    assert not [line for line in needed if "stdc++" in line]


def test_flags_that_need_more_libraries_get_what_the_compiler_links_by_itself(monkeypatch):
    monkeypatch.setenv("TRITON_CPU_FLAGS", "-fsanitize=undefined")
    if toolchain.toolchain().kind != "gcc":
        pytest.skip("clang links its runtime by other rules")
    assert toolchain.toolchain().libraries == ()
    assert build.load(build.build(SOURCE, "seven")).tcpu_launch(0, 0, 0, 0, None) == 7
