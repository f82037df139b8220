"""Write docs/triton-language.md: what of the Triton language runs on triton_cpu.

python tests/triton_cpu/language_table.py --write    # runs the tests, then writes the table
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "triton-language.md"

# The sections of triton-lang.org/main/python-api/triton.language.html
REFERENCE = {
    "Programming model": "tensor program_id num_programs",
    "Creation": "arange cat full zeros zeros_like cast",
    "Shape manipulation": (
        "broadcast broadcast_to expand_dims interleave join permute ravel reshape split trans view"
    ),
    "Linear algebra": "dot dot_scaled",
    "Memory and pointers": "load store make_block_ptr advance",
    "Tensor descriptors": (
        "make_tensor_descriptor load_tensor_descriptor store_tensor_descriptor"
        " tensor_descriptor.load tensor_descriptor.store tensor_descriptor.gather"
        " tensor_descriptor.scatter tensor_descriptor.atomic_add tensor_descriptor.atomic_and"
        " tensor_descriptor.atomic_max tensor_descriptor.atomic_min tensor_descriptor.atomic_or"
        " tensor_descriptor.atomic_xor"
    ),
    "Indexing": "flip where swizzle2d",
    "Mathematics": (
        "abs cdiv ceil clamp cos div_rn erf exp exp2 fdiv floor fma log log2 maximum minimum"
        " rsqrt sigmoid sin softmax sqrt sqrt_rn umulhi"
    ),
    "Reductions": "argmax argmin max min reduce sum xor_sum",
    "Scans and sorting": "associative_scan cumprod cumsum histogram sort topk gather",
    "Atomic operations": (
        "atomic_add atomic_and atomic_cas atomic_max atomic_min atomic_or atomic_xchg atomic_xor"
    ),
    "Random numbers": "randint4x randint rand randn",
    "Iterators": "range static_range",
    "Inline assembly": "inline_asm_elementwise",
    "Compiler hints": "assume debug_barrier max_constancy max_contiguous multiple_of",
    "Debugging": "static_print static_assert device_print device_assert",
    "Public beside the reference": (
        "atomic_load atomic_poll atomic_store expect_zero"
        " add sub mul squeeze unsqueeze item reduce_or map_elementwise bitonic_merge condition"
        " to_tensor philox philox_impl rand4x randn4x pair_uniform_to_normal uint_to_uniform_float"
    ),
}
DTYPES = "float8e4nv float8e5 float8e4b8 float8e5b16 float8e4b15"
FEATURES = (
    "for loops", "while loops", "branches", "early returns", "functions", "noinline functions",
    "scalar arguments", "constant arguments", "None as an argument", "tuples", "named tuples",
    "aggregates", "descriptors from the host", "triton.heuristics", "triton.autotune",
    "kernel[grid] after install()", "num_warps, num_stages", "pointers from integers",
    "offsets beyond 32 bits", "masks at the end of memory", "PropagateNan",
)  # fmt: skip

# Names of triton.language that are no operations: types, modules, constants
NOT_OPERATIONS = {
    *("PropagateNan", "TRITON_MAX_TENSOR_NUMEL", "block_type", "const", "constexpr"),
    *("constexpr_type", "dtype", "extra", "math", "pi32_t", "pointer_type", "slice"),
    *("target_info", "tensor_descriptor", "tuple", "void", "bfloat16", "int1", *DTYPES.split()),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *(f"float{bits}" for bits in (16, 32, 64)),
}

_PLACE_OF_NAN = (
    "among NaN, which place depends on the order in which elements meet, as on a GPU: the combining"
    " function of Triton keeps the second of two that do not compare"
)
REMARKS = {
    "advance": "removed in Triton 3.9, with `make_block_ptr`",
    "atomic_load": "new in Triton 3.9",
    "atomic_poll": "new in Triton 3.9; without a limit, an error once nobody is left to wait for",
    "atomic_store": "new in Triton 3.9",
    "expect_zero": "new in Triton 3.8",
    "argmax": _PLACE_OF_NAN,
    "argmin": _PLACE_OF_NAN,
    "atomic_add": "every `sem` and `scope` is served by the strongest",
    "debug_barrier": "nothing to wait for: one thread runs a program",
    "device_assert": "with `debug=True`; raises once the grid has run; in combining functions too",
    "device_print": "one line an element, in the format of GPUs; `hex` leaves floats as they are",
    "early returns": "of a program, and of functions wherever they are called",
    "dot": "sizes from 1 on; float32 products are exact to float32, whatever `input_precision`",
    "load": "cache hints are read and change nothing; volatile loads are atomic, those whose result"
    " nobody uses fetch into the cache",
    "make_block_ptr": "removed in Triton 3.9",
    "map_elementwise": "the function may branch, loop, load and return early; Triton itself refuses"
    " stores, atomic operations and assertions in it",
    "max": "NaN is passed over, as on a GPU; with `return_indices` see `argmax`",
    "min": "NaN is passed over, as on a GPU; with `return_indices` see `argmax`",
    "num_warps, num_stages": "are read and change nothing",
    "range": "`num_stages`, `flatten`, `warp_specialize` are read and change nothing",
    "store": "cache hints are read and change nothing",
    "view": "deprecated in Triton",
}

INTRODUCTION = """\
# The Triton language on `triton_cpu`

What of the [language reference](https://triton-lang.org/main/python-api/triton.language.html) runs
on a CPU, by the tests in `tests/triton_cpu/`: each operation marked *yes* has a test that compares
it with PyTorch. *Interpreter* says whether the same test, on the same inputs, also agrees with
Triton's interpreter (`TRITON_INTERPRET=1`); where it does not, the interpreter cannot run it, or is
wrong, and the remark says how.

This page is written by `python tests/triton_cpu/language_table.py --write`.

"""


def load(path: Path) -> ModuleType:
    """Import a file of this folder."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)
    specification.loader.exec_module(module)
    return module


def tests() -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """Yield the tests of the language by name, each with its marks by name."""
    for path in sorted(HERE.glob("test_language_*.py")):
        for name, function in vars(load(path)).items():
            if name.startswith("test_"):
                marks: dict[str, list[Any]] = {}
                for mark in getattr(function, "pytestmark", []):
                    marks.setdefault(mark.name, []).append(mark)
                yield f"{path.stem}::{name}", marks


class Entry:
    """What the tests say about one operation."""

    def __init__(self) -> None:
        self.passing: list[str] = []
        self.failing: list[str] = []
        self.compared = False
        self.objections: list[str] = []
        self.refusal: str | None = None

    @property
    def status(self) -> str:
        if self.refusal is not None:
            return "no"
        return "yes" if self.passing and not self.failing else "no"

    @property
    def interpreter(self) -> str:
        return "yes" if self.compared else "–"

    def remark(self, name: str) -> str:
        parts = [REMARKS[name]] if name in REMARKS else []
        if self.refusal is not None:
            parts.append(f"refused by name: {self.refusal}")
        elif self.failing:
            parts.append(f"fails: {', '.join(self.failing)}")
        elif not self.passing:
            parts.append("not tested")
        elif not self.compared:
            parts.append(f"interpreter: {self.objections[0]}")
        return "; ".join(parts)


def collect(failed: frozenset[str] = frozenset()) -> dict[str, Entry]:
    """Return the operations that tests name. ``failed``: the tests that do not pass."""
    entries: dict[str, Entry] = {}
    for test, marks in tests():
        objections = [mark.args[0] for mark in marks.get("no_interpreter", [])]
        broken = test in failed or "xfail" in marks
        for mark in marks.get("ops", []):
            for name in mark.args:
                entry = entries.setdefault(name, Entry())
                (entry.failing if broken else entry.passing).append(test.split("::")[1])
                entry.compared |= not objections and not broken
                entry.objections += objections
        for mark in marks.get("refused", []):
            entry = entries.setdefault(mark.args[0], Entry())
            entry.refusal = mark.args[1]
    return entries


def rows(names: list[str], entries: dict[str, Entry]) -> Iterator[str]:
    """Yield a table."""
    yield "| | triton_cpu | interpreter | remark |"
    yield "| --- | --- | --- | --- |"
    for name in names:
        entry = entries.get(name, Entry())
        text = f"| `{name}` | {entry.status} | {entry.interpreter} | {entry.remark(name)} |"
        yield text.replace("|  |", "| |")
    yield ""


def document(entries: dict[str, Entry]) -> str:
    """Return the page."""
    operations = [name for names in REFERENCE.values() for name in names.split()]
    passing = [name for name in operations if entries.get(name, Entry()).status == "yes"]
    compared = [name for name in passing if entries[name].compared]
    functions = {case.name for kind in load(HERE / "libdevice_cases.py").KINDS for case in kind()}
    lines = [
        f"**{len(passing)} of {len(operations)} operations run**, {len(compared)} of them compared "
        f"with the interpreter too; and {len(functions)} functions of libdevice.",
        "",
    ]
    for section, names in REFERENCE.items():
        lines += [f"## {section}", "", *rows(names.split(), entries)]
    lines += ["## Floats of 8 bits", "", *rows(DTYPES.split(), entries)]
    lines += ["## Beside operations", "", *rows(list(FEATURES), entries)]
    lines += ["## libdevice", "", "From `triton.language.extra.libdevice`, in every overload:", ""]
    return INTRODUCTION + "\n".join(lines) + "\n" + wrapped(sorted(functions))


def wrapped(names: list[str]) -> str:
    """Return names in lines of at most 100 characters."""
    lines = [""]
    for name in names:
        word = f"`{name}`, "
        if len(lines[-1] + word) > 101:
            lines.append("")
        lines[-1] += word
    return "\n".join(line.rstrip() for line in lines).rstrip(",") + ".\n"


def failures() -> frozenset[str]:
    """Run the tests of the language; return those of which a case fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        files = sorted(str(path) for path in HERE.glob("test_language_*.py"))
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files]
        subprocess.run(command, cwd=HERE.parents[1], check=False)
        failed = set()
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                module = case.get("classname").rsplit(".", 1)[-1]
                failed.add(f"{module}::{case.get('name').split('[')[0]}")
    return frozenset(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="run the tests and write the page")
    if parser.parse_args().write:
        DOCUMENT.write_text(document(collect(failures())))
    else:
        sys.stdout.write(document(collect()))
