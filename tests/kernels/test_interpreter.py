"""The Triton kernels without a GPU, in Triton's interpreter.

TRITON_INTERPRET has to be set before a kernel is decorated: hence one process for all of them. In
it Triton runs on CPU tensors, so that the backend ``triton`` joins the tests of the ops.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def is_older(package, release):
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2])) < release


@pytest.mark.skipif(
    is_older("triton", (3, 7)) and not is_older("numpy", (2, 5)),
    reason="the interpreter of Triton 3.6 needs NumPy below 2.5",
)
def test_the_kernels_pass_the_tests_of_the_ops(request):
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *(str(HERE / name) for name in ("test_quantize.py", "test_ternary_linear.py")),
        # the interpreter multiplies the bits of bfloat16 as integers in tl.dot (Triton 3.7)
        *("-k", "cpu-triton and not bfloat16"),
        *("--seed", str(request.config.option.seed)),
    ]  # fmt: skip
    run = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout.rsplit(" passed", 1)[0].split()[-1]) > 50, run.stdout
