"""Calls of tl.sort and tl.topk that are kept whole, and the C++ routines that they become."""

import ctypes
import inspect
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import triton
import triton.language as tl

from bitnet_triton.triton_cpu import native
from bitnet_triton.triton_cpu.compiler import simplify
from bitnet_triton.triton_cpu.native import NativeCall, lookup, mark

INCLUDE = Path(native.__file__).parent / "include"
PREFIX = "triton.language.standard.sort_impl__"


# ---- from Triton's front end through the passes


@triton.jit
def sort_kernel(
    x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, DESCENDING: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y_ptr + at, tl.sort(tl.load(x_ptr + at), dim=DIM, descending=DESCENDING))


@triton.jit
def sort_line_kernel(x_ptr, y_ptr, N: tl.constexpr, DIM: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.sort(tl.load(x_ptr + at), dim=DIM))


@triton.jit
def topk_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows = tl.arange(0, M)[:, None]
    x = tl.load(x_ptr + rows * N + tl.arange(0, N)[None, :])
    tl.store(y_ptr + rows * K + tl.arange(0, K)[None, :], tl.topk(x, K))


@triton.jit
def smallest_kernel(x_ptr, y_ptr, N: tl.constexpr, K: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr + tl.arange(0, K), tl.topk(x, K, descending=False))


@triton.jit
def sort_bool_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.sort(tl.load(x_ptr + at) > 0))


@triton.jit
def loop_kernel(x_ptr, y_ptr, steps, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    for _ in range(steps):
        x = tl.sort(x) + tl.flip(x, 0)
        tl.sort(x)  # not used by anyone
    tl.store(y_ptr + at, x)


@triton.jit
def sort_impl(x, k: tl.constexpr, dim: tl.constexpr, descending: tl.constexpr):
    return x + k + dim + descending


@triton.jit
def namesake_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, sort_impl(tl.load(x_ptr + at), 4, 0, True))


def front_end(kernel, element, constants):
    """Return the module that Triton's front end makes of a kernel on pointers x and y."""
    target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
    backend = triton.compiler.make_backend(target)
    options = backend.parse_options({})
    context = native.ir.context()
    native.ir.load_dialects(context)
    backend.load_dialects(context)
    kinds = {"x_ptr": f"*{element}", "y_ptr": f"*{element}", "steps": "i32"}
    source = triton.compiler.ASTSource(
        kernel, {n: kinds.get(n, "constexpr") for n in kernel.arg_names}, constexprs=constants
    )
    known = {
        "target": target,
        "options": options,
        "codegen_fns": backend.get_codegen_implementation(options),
        "module_map": backend.get_module_map(),
        "context": context,
    }
    wanted = inspect.signature(source.make_ir).parameters
    return source.make_ir(**{name: known[name] for name in wanted})


def calls_of(module):
    found = []

    def visit(operation):
        if operation.get_name() == "tt.call":
            found.append(operation.get_flat_symbol_ref_attr("callee"))

    module.walk(visit)
    return found


def surviving_calls(kernel, element="fp32", **constants):
    """Return what the calls mean that are left after all passes."""
    module = front_end(kernel, element, constants)
    mark(module)
    simplify(module)
    return [lookup(name) for name in calls_of(module)]


@pytest.mark.parametrize("descending", [False, True, 0, 1])
@pytest.mark.parametrize("dim", [None, 1])
def test_a_marked_sort_survives_the_passes(dim, descending):
    calls = surviving_calls(sort_kernel, M=2, N=8, DIM=dim, DESCENDING=descending)
    assert calls == [NativeCall("sort", axis=1, descending=bool(descending), k=None)]


@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize(
    "element",
    ["i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "fp16", "bf16", "fp32", "fp64"],
)
def test_the_name_tells_whether_elements_are_unsigned(element, dim):
    calls = surviving_calls(sort_line_kernel, element, N=4, DIM=dim)
    assert calls == [NativeCall("sort", 0, False, None, unsigned=element[0] == "u")]


@pytest.mark.parametrize(("N", "K"), [(16, 4), (16, 16), (16, 2)])
def test_a_marked_topk_survives_the_passes(N, K):
    calls = surviving_calls(topk_kernel, M=2, N=N, K=K)
    assert calls == [NativeCall("topk", axis=1, descending=True, k=K)]


@pytest.mark.skipif(
    "descending" not in tl.standard.topk.arg_names, reason="this Triton's topk has no descending"
)
def test_a_topk_of_the_smallest_values_is_understood():
    assert surviving_calls(smallest_kernel, N=16, K=4) == [NativeCall("topk", 0, False, 4)]


def test_calls_in_a_loop_stay_and_other_helpers_are_inlined():
    assert set(surviving_calls(loop_kernel, N=8)) == {NativeCall("sort", 0, False, None)}


@pytest.mark.parametrize("kernel", [sort_bool_kernel, namesake_kernel])
def test_what_is_not_ours_is_inlined(kernel):
    assert surviving_calls(kernel, "i8", N=8) == []


def test_without_marks_nothing_is_kept():
    module = front_end(topk_kernel, "fp32", {"M": 2, "N": 8, "K": 2})
    simplify(module)
    assert calls_of(module) == []


def test_a_sort_impl_with_other_parameters_is_left_alone(monkeypatch):
    monkeypatch.setattr(native, "_PARAMETERS", ["x", "k", "dim", "descending", "indices"])
    assert surviving_calls(topk_kernel, M=2, N=8, K=2) == []


def test_a_callee_whose_types_contradict_its_name_is_left_alone(monkeypatch):
    monkeypatch.setitem(native._ELEMENTS, "fp32", "f16")
    assert surviving_calls(topk_kernel, M=2, N=8, K=2) == []


# ---- names, of every version


@pytest.mark.parametrize(
    ("signature", "call"),
    [
        ("fp32S64S_cNone_cNone_c0", NativeCall("sort", 0, False, None)),
        ("fp32S2_64S_cNone_c1_cTrue", NativeCall("sort", 1, True, None)),
        ("u8S2_4_64S_cNone_c2_cFalse", NativeCall("sort", 2, False, None, unsigned=True)),
        ("bf16S2_64S_c16_cNone_cTrue", NativeCall("topk", 1, True, 16)),
        ("i64S64S_c20_c0_cFalse", NativeCall("topk", 0, False, 16)),
        (
            "fp32S64S__(1,)cNone_(2,)cconstexpr_None__(3,)cconstexpr_0_",
            NativeCall("sort", 0, False, None),
        ),
        (
            "u16S2_64S__(1,)cNone_(2,)cconstexpr_1__(3,)cconstexpr_True_",
            NativeCall("sort", 1, True, None, unsigned=True),
        ),
        (
            "fp16S2_64S__(1,)cconstexpr_4__(2,)cconstexpr_None__(3,)cconstexpr_True_",
            NativeCall("topk", 1, True, 4),
        ),
        ("fp64S64S__(1,)c4_(2,)cNone_(3,)cTrue", NativeCall("topk", 0, True, 4)),
    ],
)
@pytest.mark.parametrize("form", ["{}", "@{}", '@"{}"'])
def test_a_name_says_what_is_computed(signature, call, form):
    assert lookup(form.format(PREFIX + signature)) == call


@pytest.mark.parametrize(
    "name",
    [
        "triton.language.standard.sort__fp32S64S_cNone_c0",
        "triton.language.standard.flip__fp32S64S_c0",
        "mine.sort_impl__fp32S64S_cNone_cNone_c0",
        PREFIX + "fp32S64S_cNone_cNone_c2",  # 2 stands for alternating directions
        PREFIX + "fp32S64S_cNone_cNone_cNone",
        PREFIX + "fp32S2_64S_cNone_c0_c0",  # not the last dimension
        PREFIX + "fp32S64S_cNone_c-1_c0",
        PREFIX + "fp32S64S_c128_cNone_cTrue",  # more than there are
        PREFIX + "fp32S64S_c0_cNone_cTrue",
        PREFIX + "fp32S64S_cNone_cNone_c0_c1",
        PREFIX + "fp32S64S_cNone_c0",
        PREFIX + "fp32_cNone_cNone_c0",
        PREFIX + "i1S64S_cNone_cNone_c0",
        PREFIX + "fp8e5S64S_cNone_cNone_c0",
        PREFIX + "Pfp32S64S_cNone_cNone_c0",
        PREFIX + "fp32S64S__(1,)cNone_(3,)cconstexpr_0_",
        PREFIX,
        "",
    ],
)
def test_a_name_that_is_not_understood_is_refused(name):
    assert lookup(name) is None


# ---- sort.h by itself

# C++ types and NumPy's type of the same bits; bf16 has none of its own
TYPES = {f"{u}int{bits}_t": f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)}
TYPES |= {"float": "float32", "double": "float64", "f16": "float16", "bf16": "uint16"}
LENGTHS = (1, 2, 8, 64, 512)
SELECTIONS = ((8, 1), (8, 4), (64, 1), (64, 16), (256, 64), (256, 256))  # (N, K)
CPUS = ["", "x86-64-v3", "native"]  # without a name: any CPU of this kind


def source():
    lines = ['#include "sort.h"', "using namespace tcpu;"]
    for t in TYPES:
        for down in (0, 1):
            lines += [
                f'extern "C" void sort_{t}_{down}_{n}({t}* x) {{ sort_row<{t}, {down}, {n}>(x); }}'
                for n in LENGTHS
            ]
            lines += [
                f'extern "C" void topk_{t}_{down}_{n}_{k}(const {t}* x, {t}* y)'
                f" {{ topk_row<{t}, {down}, {n}, {k}>(x, y); }}"
                for n, k in SELECTIONS
            ]
    return "\n".join(lines)


def can_run(cpu):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return cpu != "x86-64-v3" or " avx2 " in flags


def compile_cpp(folder, source, *flags):
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (folder / "sort.cpp").write_text(source)
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-function", f"-I{INCLUDE}"]
    done = subprocess.run(
        [*command, *flags, "sort.cpp"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "sort.h" not in done.stderr, done.stderr


@pytest.fixture(scope="module", params=CPUS, ids=lambda cpu: cpu or "any")
def library(request, tmp_path_factory):
    if not can_run(request.param):
        pytest.skip("needs a CPU with AVX2")
    folder = tmp_path_factory.mktemp("sort")
    cpu = [f"-march={request.param}"] if request.param else []
    compile_cpp(folder, source(), "-O1", *cpu, "-shared", "-fPIC", "-o", "sort.so")
    return ctypes.CDLL(str(folder / "sort.so"))


def test_the_header_goes_with_the_others(tmp_path):
    compile_cpp(tmp_path, '#include "tcpu.h"\n' + source(), "-fsyntax-only")


def values_of(bits, t):
    """Return the numbers that an array of bits stands for."""
    if t == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(TYPES[t])


def finite_numbers(t, n, rng):
    """Yield numbers as bits: many, a few over and over, and extremes with both zeros."""
    dtype = np.dtype(TYPES[t])
    unsigned = np.dtype(f"uint{8 * dtype.itemsize}")
    if np.issubdtype(dtype, np.integer) and t != "bf16":
        info = np.iinfo(dtype)
        everything = rng.integers(info.min, info.max, n, dtype, endpoint=True)
        extremes = np.array([info.min, info.max, 0, 1, -1 if info.min else info.max - 1], dtype)
    else:
        dtype = np.dtype(np.float32) if t == "bf16" else dtype
        everything = rng.standard_normal(n).astype(dtype)
        tiny = {"float16": 6e-8, "float64": 5e-324}.get(TYPES[t], 1e-40)
        extremes = np.array([0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, tiny, -tiny], dtype)
    several = rng.choice(everything, 3)
    for numbers in (everything, rng.choice(several, n), rng.choice(extremes, n)):
        bits = numbers.view(np.uint32) >> 16 if t == "bf16" else numbers.view(unsigned)
        yield bits.astype(unsigned)


def unaligned(bits):
    """Copy to an address that no vector is aligned to."""
    space = np.zeros(bits.size + 1, bits.dtype)[1:]
    space[:] = bits
    return space


def run(function, *arrays):
    function(*(ctypes.c_void_p(array.ctypes.data) for array in arrays))


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("down", [0, 1])
def test_rows_are_sorted(library, t, down, rng):
    for n in LENGTHS:
        for bits in finite_numbers(t, n, rng):
            row = unaligned(bits)
            run(library[f"sort_{t}_{down}_{n}"], row)

            want = np.sort(values_of(bits, t))
            np.testing.assert_array_equal(values_of(row, t), want[::-1] if down else want)
            np.testing.assert_array_equal(np.sort(row), np.sort(bits))  # -0 is not 0


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("down", [0, 1])
def test_the_first_values_are_taken(library, t, down, rng):
    for n, k in SELECTIONS:
        for bits in finite_numbers(t, n, rng):
            guarded = np.full(k + 2, 77, bits.dtype)
            row = unaligned(bits)
            run(library[f"topk_{t}_{down}_{n}_{k}"], row, guarded[1:])

            want = np.sort(values_of(bits, t))
            want = (want[::-1] if down else want)[:k]
            np.testing.assert_array_equal(values_of(guarded[1:-1], t), want)
            np.testing.assert_array_equal(guarded[[0, -1]], 77)
            np.testing.assert_array_equal(row, bits)


@pytest.mark.parametrize("t", ["float", "double", "f16", "bf16"])
@pytest.mark.parametrize("down", [0, 1])
def test_every_nan_comes_out_once_and_numbers_stay_in_order(library, t, down, rng):
    unsigned = f"uint{8 * np.dtype(TYPES[t]).itemsize}"
    quiet = {"bf16": 0x7FC0}.get(t) or np.array(np.nan, TYPES[t]).view(unsigned)
    sign = np.iinfo(unsigned).max // 2 + 1
    for n in LENGTHS:
        bits = next(finite_numbers(t, n, rng))
        bits[rng.random(n) < 0.3] = quiet | 1
        bits[rng.random(n) < 0.3] = quiet | sign
        row = unaligned(bits)
        run(library[f"sort_{t}_{down}_{n}"], row)

        np.testing.assert_array_equal(np.sort(row), np.sort(bits))
        numbers = values_of(row, t)
        numbers = numbers[~np.isnan(numbers)]
        np.testing.assert_array_equal(numbers, np.sort(numbers)[:: -1 if down else 1])


@pytest.fixture
def rng(request):
    return np.random.default_rng(request.config.getoption("seed"))
