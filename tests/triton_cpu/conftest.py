"""How the tests of triton_cpu run a kernel, and with what they compare it.

A test of the language takes ``run`` and ``check``. It runs twice: against PyTorch (the expectation
it states) and against Triton's interpreter, which ran the same test on the same inputs in a process
of its own, because TRITON_INTERPRET has to be set before a kernel is decorated. (Under
TRITON_INTERPRET=1 pytest here asks whether the interpreter meets the expectations.)

``@pytest.mark.ops(...)`` names the operations a test covers (docs/triton-language.md counts them);
``@pytest.mark.no_interpreter(reason)`` says why the interpreter is no judge of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import math
import mmap
import os
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

ORACLES = ("vs_torch", "vs_interpreter")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RECORD = os.environ.get("TRITON_CPU_TESTS_RECORD")  # a folder: the interpreter's process
PATIENCE = 600  # seconds for the interpreter's process
SELECTED = pytest.StashKey[list[str]]()


def release(package):
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))


# The interpreter of Triton 3.6 takes arrays of one element for numbers, NumPy 2.4 no longer does
INTERPRETER_WORKS = release("triton") >= (3, 7) or release("numpy") < (2, 4)


def pytest_configure(config):
    for line in (
        "ops(*names): the operations of the Triton language that the test covers",
        "refused(name, reason): the test covers that triton_cpu refuses the operation by name",
        "no_interpreter(reason): Triton's interpreter cannot run the test, or is wrong",
    ):
        config.addinivalue_line("markers", line)


def pytest_generate_tests(metafunc):
    if "oracle" in metafunc.fixturenames:
        metafunc.parametrize("oracle", ORACLES[:1] if INTERPRETED else ORACLES)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what the interpreter is no judge of; put its tests last, while it works."""

    def has_a_judge(item):
        alone = any(item.get_closest_marker(name) for name in ("no_interpreter", "refused"))
        return INTERPRETER_WORKS and not alone

    if INTERPRETED:
        items[:] = [item for item in items if has_a_judge(item)]
    for_interpreter = [item for item in items if is_compared(item) and has_a_judge(item)]
    items[:] = [item for item in items if not is_compared(item)] + for_interpreter
    config.stash[SELECTED] = [key_of(item) for item in for_interpreter]


def is_compared(item):
    return "vs_interpreter" in item.name


def key_of(item):
    """Return the name that a test has in both processes."""
    return item.nodeid.replace("vs_interpreter", "vs_torch")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if RECORD and report.failed:
        record_path(RECORD, key_of(item)).with_suffix(".error").write_text(str(report.longrepr))
    return report


def pytest_sessionfinish(session):
    if RECORD and not hasattr(session.config, "workerinput"):
        Path(RECORD, "done").touch()


def record_path(folder, key):
    return Path(folder, re.sub(r"[^\w.-]", "_", key) + ".pt")


class Interpreter:
    """The process that runs the selected tests under TRITON_INTERPRET, for all xdist workers."""

    def __init__(self, folder, config, seed):
        self.folder = folder
        self.process = None
        try:
            folder.mkdir()
        except FileExistsError:
            return
        (folder / "selected.txt").write_text("\n".join(config.stash[SELECTED]))
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("--seed", str(seed), f"@{folder / 'selected.txt'}"),
        ]
        environment = {"TRITON_INTERPRET": "1", "TRITON_CPU_TESTS_RECORD": str(folder)}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
                cwd=config.rootpath,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def outputs(self, key):
        deadline = time.monotonic() + PATIENCE
        while not (self.folder / "done").exists():
            ended = self.process is not None and self.process.poll() is not None
            if (ended and not (self.folder / "done").exists()) or time.monotonic() > deadline:
                log = (self.folder / "log").read_text()
                pytest.fail(f"the interpreter's process came to nothing:\n{log}")
            time.sleep(0.05)
        path = record_path(self.folder, key)
        if (error := path.with_suffix(".error")).exists():
            pytest.fail(f"in Triton's interpreter:\n{error.read_text()}")
        return torch.load(path)


@pytest.fixture(scope="session")
def common_folder(request, tmp_path_factory):
    """Return a folder that all workers of xdist see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.fixture(scope="session")
def input_seed(request, common_folder):
    """Return one seed for all workers of xdist: a test and its interpreter may meet in two."""
    mine = common_folder / f"seed-{os.getpid()}"
    mine.write_text(str(request.config.option.seed))
    with contextlib.suppress(FileExistsError):
        os.link(mine, common_folder / "seed")
    return int((common_folder / "seed").read_text())


@pytest.fixture(scope="session")
def interpreter(request, common_folder, input_seed):
    return Interpreter(common_folder / "interpreter", request.config, input_seed)


@pytest.fixture
def run(request):
    """Return ``run(kernel, grid)(*arguments)``."""
    if INTERPRETED:
        return lambda kernel, grid: kernel[grid]
    if request.config.stash[SELECTED]:
        request.getfixturevalue("interpreter")  # starts now, is asked later
    import bitnet_triton.triton_cpu as triton_cpu

    return triton_cpu.launch


@pytest.fixture
def threads():
    """Return ``threads(n)``: the programs of a grid run on so many threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _same_inputs(request, _fresh_state, input_seed):
    """Draw the same inputs for both oracles, in both processes."""
    torch.manual_seed(input_seed + zlib.crc32(key_of(request.node).encode()))


class Check:
    """Compares results, in the order in which a test hands them over."""

    def __init__(self, oracle, outputs, path):
        self.oracle = oracle
        self.outputs = outputs
        self.path = path
        self.seen = []

    def __call__(self, got, expected, *, ulp=0.0, atol=0.0):
        """Compare ``got`` with what is right, up to ``ulp`` units in the last place plus ``atol``.

        ``expected`` may be in a wider dtype than ``got``. NaN equals NaN. Without ``ulp`` and
        ``atol`` the two are equal, zeros of either sign included. ``atol`` may be a tensor.
        """
        __tracebackhide__ = True
        self.seen.append(got.detach().clone())
        number = len(self.seen) - 1
        if self.path:
            torch.save(self.seen, self.path)
            return
        if self.oracle == "vs_interpreter":
            # both are off from the exact result, and the interpreter rounds its constants its way
            compare(f"output {number}", got, self.outputs[number], ulp=2 * ulp, atol=2 * atol)
        else:
            compare(f"output {number}", got, expected, ulp=ulp, atol=atol)


@pytest.fixture
def check(request, oracle):
    key = key_of(request.node)
    outputs = None
    if oracle == "vs_interpreter":
        outputs = request.getfixturevalue("interpreter").outputs(key)
    return Check(oracle, outputs, record_path(RECORD, key) if RECORD else None)


def compare(name, got, expected, *, ulp, atol):
    """Raise AssertionError unless ``got`` is ``expected``, up to the tolerance."""
    __tracebackhide__ = True
    assert list(got.shape) == list(expected.shape), f"{name}: {got.shape}, not {expected.shape}"
    if not got.dtype.is_floating_point:
        wrong = got != expected.to(got.dtype)
    else:
        wide = expected.double()
        limit = atol + ulp * unit_in_the_last_place(wide, got.dtype)
        # what is exactly between two neighbours may become either of them
        rounded = wide.to(got.dtype).double() if got.dtype.itemsize > 1 else wide
        error = (got.double() - (rounded if ulp == 0 else wide)).abs()
        wrong = ~((got.double() == rounded) | (error <= limit)) & ~(got.isnan() & wide.isnan())
    if wrong.any():
        index = tuple(int(i) for i in wrong.nonzero()[0])
        pytest.fail(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are wrong; {list(index)} is "
            f"{got[index].item()!r}, expected {expected[index].item()!r}"
        )


def unit_in_the_last_place(x, dtype):
    info = torch.finfo(dtype)
    finite = torch.nan_to_num(x.abs(), nan=0.0, posinf=0.0)
    _, exponent = torch.frexp(finite)
    step = torch.ldexp(torch.full_like(finite, info.eps), exponent - 1)
    return step.clamp_min(info.smallest_normal * info.eps)


libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@pytest.fixture
def fenced():
    """Return ``fenced(tensor)``: a copy that ends where memory ends: a byte further is a fault.

    ``fenced(tensor, front=True)`` begins where memory begins.
    """
    with contextlib.ExitStack() as stack:
        yield lambda tensor, front=False: fence(tensor, front, stack)


def fence(tensor, front, stack):
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    pages = math.ceil(size / page)
    area = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for edge in (start, start + (pages + 1) * page):
        assert libc.mprotect(edge, page, 0) == 0, os.strerror(ctypes.get_errno())
        stack.callback(libc.mprotect, edge, page, mmap.PROT_READ | mmap.PROT_WRITE)
    offset = page if front else (pages + 1) * page - size
    view = memoryview(area)[offset : offset + size]
    copy = torch.frombuffer(view, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
