"""Run generated kernels in Triton's interpreter: a line of three paths each, on standard input.

A process of its own, because TRITON_INTERPRET has to be set before Triton is imported.
"""

import runpy
import sys
import warnings

import torch

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        source, inputs, outputs = line.rstrip("\n").split("\t")
        try:
            arguments, grid = torch.load(inputs)
            runpy.run_path(source)["kernel"][grid](*arguments)
            torch.save(arguments, outputs)
            answer = "done"
        except Exception as error:
            answer = repr(error)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()
