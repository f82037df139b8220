"""What a digest of a kernel depends on, and what it does not."""

from __future__ import annotations

import importlib.util
import linecache

import pytest

from bitnet_triton.runtime.digest import digest

KERNEL = '''
import triton
import triton.language as tl

STEP = tl.constexpr(2)


@triton.jit
def inner(x):
    return x + STEP


@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    """Add two."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    if BLOCK > 4:
        x = inner(x)
    tl.store(x_ptr + at, x)
'''


@pytest.fixture
def digest_of(tmp_path):
    """Return the digest of ``kernel`` in a module of this text."""

    def load(text):
        path = tmp_path / "kernels.py"
        path.write_text(text)
        specification = importlib.util.spec_from_file_location("kernels_of_a_test", path)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        # inspect keeps the lines of a file of the same name
        linecache.clearcache()
        return digest(module.kernel, "sm_90", {"BLOCK": 8})

    return load


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("STEP = ", "# another line\n\nSTEP = "),
        ('    """Add two."""\n', ""),
        ("    at = ", "    # where\n    at = "),
        ("tl.load(x_ptr + at)", "tl.load(\n        x_ptr + at\n    )"),
        ("def inner", "def unused(y):\n    return y\n\n\n@triton.jit\ndef inner"),
    ],
    ids=["lines above", "docstring", "comment", "layout", "another function"],
)
def test_what_does_not_change_the_code_does_not_change_the_digest(old, new, digest_of):
    assert old in KERNEL
    assert digest_of(KERNEL.replace(old, new)) == digest_of(KERNEL)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("constexpr(2)", "constexpr(3)"),
        ("x + STEP", "x - STEP"),
        ("BLOCK > 4", "BLOCK > 5"),
        ("        x = inner(x)\n    tl.store", "        x = inner(x)\n        tl.store"),
        ("@triton.jit\ndef inner", "@triton.jit(noinline=True)\ndef inner"),
    ],
    ids=["constant", "function that is called", "kernel", "block", "not inlined"],
)
def test_what_may_change_the_code_changes_the_digest(old, new, digest_of):
    assert old in KERNEL
    assert digest_of(KERNEL.replace(old, new)) != digest_of(KERNEL)


def test_target_and_constants_count(digest_of, monkeypatch):
    plain = digest("sm_90", {"BLOCK": 8})
    assert plain == digest("sm_90", {"BLOCK": 8})
    assert len({plain, digest("sm_80", {"BLOCK": 8}), digest("sm_90", {"BLOCK": 16})}) == 3
    monkeypatch.setattr("triton.__version__", "0.0")
    assert digest("sm_90", {"BLOCK": 8}) != plain
