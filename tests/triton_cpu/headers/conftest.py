"""Builds of program.cpp for several instruction sets, each as a function that runs one entry."""

import concurrent.futures
import fcntl
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import bitnet_triton

INCLUDE = Path(bitnet_triton.__file__).parent / "triton_cpu" / "include"
PROGRAM = Path(__file__).parent / "program.cpp"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-fopenmp", "-Wall", "-Wextra"]
CROSS = "aarch64-linux-gnu-g++"

# What a CPU must offer to run what is built for an instruction set
NEEDED = {
    "x86-64-v3": "avx2 fma f16c bmi2",
    "x86-64-v2": "sse4_2",
    "alderlake": "avx2 fma f16c bmi2 avx_vnni",
    "skylake-avx512": "avx512f avx512bw avx512dq avx512vl",
}
IS_X86 = platform.machine() == "x86_64"
EVERYTHING = "native"
WHOLE = [EVERYTHING, *(["x86-64-v2"] if IS_X86 else [])]
PRODUCTS = [*(["x86-64-v3", "alderlake", "skylake-avx512"] if IS_X86 else []), "aarch64"]


def compiler():
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def build(target, folder):
    """Return the command that runs the program, or the reason for which there is none."""
    output = folder / target
    options = ["-DPRODUCTS_ONLY"] if target in PRODUCTS else []
    options += ["-DRARE_PRODUCTS"] if target == EVERYTHING else []
    if target == "aarch64":
        if shutil.which(CROSS) is None or shutil.which("qemu-aarch64") is None:
            return f"{CROSS} and qemu-aarch64 are not both installed"
        command = [CROSS, "-static", "-march=armv8.2-a+dotprod"]
        start = ["qemu-aarch64", "-cpu", "max", str(output)]
    else:
        flags = Path("/proc/cpuinfo").read_text().split() if IS_X86 else []
        if missing := set(NEEDED.get(target, "").split()) - set(flags):
            return f"this CPU lacks {', '.join(sorted(missing))}"
        command = [compiler(), f"-march={target}" if IS_X86 else f"-mcpu={target}"]
        start = [str(output)]
    command += [*FLAGS, "-Werror", *options, "-I", str(INCLUDE), str(PROGRAM), "-o", str(output)]
    with output.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if output.exists():  # another worker of xdist has built it
            return start
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, f"{' '.join(command)}\n{built.stderr[:4000]}"
    return start


@pytest.fixture(scope="session")
def builds(common_folder):
    compiler()
    folder = common_folder / "headers"
    folder.mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {target: pool.submit(build, target, folder) for target in WHOLE + PRODUCTS}


def caller(builds, target):
    start = builds[target].result()
    if isinstance(start, str):
        pytest.skip(start)

    def call(name, *values, result):
        """Run one entry: integers become arguments, arrays its input."""
        words = [str(int(v)) for v in values if not isinstance(v, np.ndarray)]
        data = b"".join(np.ascontiguousarray(v) for v in values if isinstance(v, np.ndarray))
        done = subprocess.run([*start, name, *words], input=data, capture_output=True, check=False)
        assert done.returncode == 0, f"{target}: {name} {words}: exit {done.returncode}"
        return np.frombuffer(done.stdout, result)

    return call


@pytest.fixture(scope="session", params=WHOLE)
def call(request, builds):
    return caller(builds, request.param)


@pytest.fixture(scope="session", params=WHOLE + PRODUCTS)
def call_product(request, builds):
    return caller(builds, request.param)


@pytest.fixture(scope="session")
def call_rare(builds):
    return caller(builds, EVERYTHING)


@pytest.fixture(scope="session")
def command():
    """Return the start of a command that compiles with the headers."""
    return [compiler(), *FLAGS, "-I", str(INCLUDE)]
