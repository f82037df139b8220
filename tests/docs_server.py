"""Runs scripts, each in a process of its own that finds the code of third parties imported.

A line of input is a JSON list: script, folder to run it in, file for what it prints. A line of
output is its exit status. What importing this package does, a script has to do itself.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback

import triton.runtime.cache
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401
from transformers.models.bitnet import modeling_bitnet  # noqa: F401


def run(script, folder, printed):
    """Run ``script`` in this process as Python does, and end it."""
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.chdir(folder)
    sys.argv[:] = [script]
    sys.path[0] = folder
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:  # SystemExit as well: no block of the docs ends so
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    triton.runtime.cache.triton_key()  # reads all of Triton; it is kept
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(*json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()
