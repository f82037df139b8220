"""Run the tests of triton_cpu on several versions of Triton, each in an environment of its own.

    python tests/triton_cpu/versions.py                  # all that are supported
    python tests/triton_cpu/versions.py 3.9 3.10         # these
    python tests/triton_cpu/versions.py 3.6 -- -x -k launch   # options of pytest after --

An environment is made once, in ``--folder``, and kept. The last lines are a table in Markdown, and
why tests were skipped.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORTED = ["3.6", "3.7", "3.8", "3.9"]
TORCH = "torch>=2.11"
NEEDS = ["pytest", "pytest-xdist", "hypothesis", "einops"]
# the interpreter of Triton 3.6 takes arrays of one element for numbers
NUMPY = {"3.6": "numpy<2.4"}
COUNTED = ["passed", "failed", "errors", "skipped", "xfailed"]


def environment(folder: Path, version: str) -> Path:
    """Return the Python of an environment with this version of Triton."""
    python = folder / f"triton-{version}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, TORCH, *NEEDS, NUMPY.get(version, "numpy")], check=True)
        # torch for GPUs asks for one version of Triton, and works with its neighbours
        subprocess.run([*install, "--no-deps", f"triton=={version}.*"], check=True)
    return python


def installed(python: Path) -> list[str]:
    code = "import numpy, torch, triton; print(*(m.__version__ for m in (triton, torch, numpy)))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def run(python: Path, options: list[str]) -> tuple[dict[str, int], Counter[str]]:
    """Return how many tests passed, failed, and so on, and how many were skipped for a reason."""
    command = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/triton_cpu"]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    last, reasons = "", Counter[str]()
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        last = line if line.strip() else last
        if skipped := re.match(r"SKIPPED \[(\d+)\] \S+ (.*)", line):
            reasons[skipped[2]] += int(skipped[1])
    process.wait()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}
    counts["errors"] = counts.get("errors", counts.get("error", 0))
    return counts, reasons


def main() -> int:
    arguments = sys.argv[1:]
    options = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, options = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", default=SUPPORTED)
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "triton_cpu_venvs")
    chosen = parser.parse_args(arguments)
    rows, why, fine = [], [], True
    for version in chosen.versions:
        python = environment(chosen.folder.absolute(), version)
        sys.stdout.write(f"\n== Triton {version}\n")
        counts, reasons = run(python, options)
        fine &= counts["errors"] == counts.get("failed", 0) == 0 and counts.get("passed", 0) > 0
        rows.append([*installed(python), *(str(counts.get(word, 0)) for word in COUNTED)])
        why += [f"{version}: {number} {reason}\n" for reason, number in reasons.most_common()]
    heads = ["triton", "torch", "numpy", *COUNTED]
    lines = [heads, ["---"] * len(heads), *rows]
    sys.stdout.write("\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    sys.stdout.write("\nskipped:\n" + "".join(why))
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
