"""From the text of a module to one C++ translation unit."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_triton.triton_cpu.emit import (  # noqa: F401  (they register what they emit)
    atomics,
    calls,
    control,
    dot,
    dot_scaled,
    memory,
    reduce,
    shape,
)
from bitnet_triton.triton_cpu.emit.ctypes import c_type
from bitnet_triton.triton_cpu.emit.dispatch import run_block
from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.values import Scalar
from bitnet_triton.triton_cpu.ir import Op
from bitnet_triton.triton_cpu.native import lookup
from bitnet_triton.triton_cpu.parse import parse_module
from bitnet_triton.triton_cpu.structure import structure

_PROGRAM = "int const pid{0}", "int const programs{0}"


@dataclass(frozen=True)
class Emitted:
    """A kernel in C++.

    Attributes:
        source: the translation unit.
        name: of the kernel.
        disjoint: pairs of positions of pointer arguments that were taken not to overlap.
        memory: bytes in which a program keeps its blocks, each element counted as 8.
    """

    source: str
    name: str
    disjoint: tuple[tuple[int, int], ...]
    memory: int


def emit_kernel(
    ir_text: str, *, materialise: bool = False, assume_disjoint: bool = True
) -> Emitted:
    """Lower a module of Triton IR to C++.

    Args:
        ir_text: the module in MLIR's generic form, with locations.
        materialise: write every block value to an array instead of fusing; to find faults.
        assume_disjoint: pointer arguments do not overlap where the order of accesses would
            matter; ``Emitted.disjoint`` says which ones.

    Raises:
        UnsupportedOperation: names the operation and its source line.
    """
    module = parse_module(ir_text)
    functions = {
        op.attributes["sym_name"].strip('"'): op
        for op in module.regions[0][0].ops
        if op.name == "tt.func"
    }
    name, kernel = next(
        (n, f) for n, f in functions.items() if "public" in f.attributes.get("sym_visibility", "")
    )
    structure(kernel, functions, keep=lambda callee: lookup(callee) is not None)
    emitter = Emitter(kernel, materialise=materialise, assume_disjoint=assume_disjoint)
    body = kernel.regions[0][0]
    for place, argument in enumerate(body.args):
        emitter.held[argument] = Scalar(_parameter(place, argument.name))
    run_block(emitter, body)
    disjoint = tuple(sorted(emitter.disjoint))
    return Emitted(_unit(emitter, kernel), name, disjoint, emitter.arena + emitter.stack)


def _parameter(place: int, name: str) -> str:
    return f"arg{place}_{name}"


def _unit(emitter: Emitter, kernel: Op) -> str:
    """Return the translation unit around the emitted body."""
    arguments = [
        (c_type(a.type), _parameter(i, a.name)) for i, a in enumerate(kernel.regions[0][0].args)
    ]
    fields = " ".join(f"alignas(8) {elem} {name};" for elem, name in arguments)
    passed = ", ".join(f"a.{name}" for _, name in arguments)
    programs = [text.format(axis) for text in _PROGRAM for axis in range(3)]
    parameters = [f"{elem} const {name}" for elem, name in arguments] + [
        "char* const arena",
        *programs,
    ]
    sorts = any("_row<" in line for line in emitter.lines)
    waits = any(line.lstrip().startswith("Poll ") for line in emitter.lines)
    grid = f"run_grid<{emitter.arena}, {'true' if waits else 'false'}>"
    return "\n".join(
        [
            '#include "tcpu.h"',
            '#include "byte_rows.h"',
            '#include "program.h"',
            *(['#include "sort.h"'] if sorts else []),
            *(['#include "poll.h"'] if waits else []),
            "using namespace tcpu;",
            f"struct Arguments {{ {fields} }};",
            f"static void program({', '.join(parameters)}) {{",
            *emitter.lines,
            "}",
            'extern "C" int tcpu_launch(int nx, int ny, int nz, int threads, const void* raw) {',
            "  const Arguments& a = *(const Arguments*)raw; (void)a;",
            "  auto run = [&](char* arena, int x, int y, int z) {",
            *(["    const Running running;"] if waits else []),
            f"    program({passed}{', ' if passed else ''}arena, x, y, z, nx, ny, nz);",
            "  };",
            f"  return {grid}(nx, ny, nz, threads, run);",
            "}",
            "",
        ]
    )
