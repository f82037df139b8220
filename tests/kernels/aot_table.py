"""What every launch costs on every target: from the table where nothing changed, else compiled.

``aot.json`` has a line for each digest (``bitnet_triton/runtime/digest.py``) of what was compiled.

python tests/kernels/aot_table.py            # a Markdown table; compiles what is not in aot.json
python tests/kernels/aot_table.py --write    # and puts it there, and takes out what is gone
python tests/kernels/aot_table.py --all      # compiles everything, and fails if aot.json disagrees
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton

from bitnet_triton.runtime.aot import (
    TARGETS,
    Resources,
    compile_for,
    describe,
    digest_of,
    markdown_table,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE / "aot.json"
TOLD_EVERY = 25
# what a line holds beside what the launch itself tells
FOUND = ("registers", "spills", "shared", "warps", "instructions", "rounding", "events")


def load(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


launches = load(HERE / "aot_launches.py")


def all_launches():
    """Return each pair of a launch and a target by its digest; equal ones once."""
    pairs = [(launch, t) for t in TARGETS for launch in launches.launches_of(t).values()]
    pairs += [(launch, "sm_80") for launch in launches.sizes_of_one()]
    return {digest_of(launch, TARGETS[target]): (launch, target) for launch, target in pairs}


def read_table(path=TABLE):
    """Return the release of Triton that a table is of, and its lines by digest."""
    if not path.exists():
        return None, {}
    data = json.loads(path.read_text())
    return data["triton"], data["lines"]


def write_table(lines, path=TABLE):
    """Write a line for each digest, in an order that a change disturbs little."""
    ordered = sorted(lines, key=lambda d: (lines[d]["kernel"], lines[d]["target"], d))
    text = ",\n".join(f"  {json.dumps(d)}: {json.dumps(lines[d])}" for d in ordered)
    head = json.dumps({"triton": triton.__version__}).rstrip("}")
    path.write_text(f'{head}, "lines": {{\n{text}\n}}}}\n')


def line_of(cost):
    """Return what the table keeps of Resources, as JSON gives it back."""
    kept = {"kernel": cost.kernel, "target": cost.target}
    for name in FOUND:
        value = getattr(cost, name)
        if value != ():
            kept[name] = list(value) if isinstance(value, tuple) else value
    return kept


def compile_part(digests):
    """Compile what these digests stand for, in this process; yield digests and lines."""
    pairs = all_launches()
    for digest in digests:
        launch, target = pairs[digest]
        yield digest, line_of(compile_for(launch, TARGETS[target]))


def compile_all(digests, tell=lambda found: None):
    """Compile what these digests stand for, and return the lines; processes share the work.

    ``tell`` is told all that was found so far, now and then.
    """
    parts = max(1, min(os.cpu_count() or 1, len(digests) // 32))
    if parts == 1:
        return dict(compile_part(digests))
    found, told = {}, threading.Lock()

    def run(part):
        process = subprocess.Popen(
            [sys.executable, __file__, "--part"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        process.stdin.write("\n".join(part))
        process.stdin.close()
        for line in process.stdout:
            with told:
                found.update([json.loads(line)])
                if len(found) % TOLD_EVERY == 0:
                    tell(found)
        assert process.wait() == 0, process.stderr.read()

    # neighbours take about as long as each other
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(run, [digests[i::parts] for i in range(parts)]))
    return found


def resources(launch, target, line):
    """Return the Resources of a launch whose code is that of a line."""
    found = {"instructions": ()}  # what is empty is not in the line
    found |= {k: tuple(v) if isinstance(v, list) else v for k, v in line.items() if k in FOUND}
    return Resources(**describe(launch, TARGETS[target]), **found)


def print_table(lines):
    pairs = all_launches().items()
    rows = [resources(launch, target, lines[d]) for d, (launch, target) in pairs]
    sys.stdout.write(markdown_table(rows) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--write", "--all", "--part"):
        parser.add_argument(option, action="store_true")
    options = parser.parse_args()
    if options.part:
        for found in compile_part(sys.stdin.read().split()):
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
        return 0
    digests, (_, known) = list(all_launches()), read_table()

    def keep(found):  # a run that is interrupted goes on where it was
        sys.stderr.write(f"{len(found)} of {len(new)} compiled\n")
        if options.write:
            write_table(known | found)

    new = [d for d in digests if options.all or d not in known]
    fresh = compile_all(new, keep)
    wrong = [d for d in fresh if d in known and fresh[d] != known[d]]
    for digest in wrong:
        sys.stderr.write(f"{digest}: the table has {known[digest]}, compiled {fresh[digest]}\n")
    lines = {digest: fresh.get(digest) or known[digest] for digest in digests}
    if options.write:
        write_table(lines)
        gone = len(known.keys() - lines.keys())
        sys.stdout.write(f"{len(lines)} lines, {len(fresh)} of them compiled, {gone} taken out\n")
    else:
        print_table(lines)
    return 1 if wrong and not options.write else 0


if __name__ == "__main__":
    sys.exit(main())
