"""Compile Triton kernels for GPUs that are not here, and read what they cost there.

Record launches with tensors on the meta device (``record_launches``), compile each for a target,
and get registers, spills, shared memory and what the compiler made of it:

    with record_launches() as launches:
        launch_my_op(x_meta, weight_meta)
    print(markdown_table([compile_for(launch, TARGETS["sm_90"]) for launch in launches]))
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitnet_triton.runtime.digest import digest
from bitnet_triton.runtime.gpu_targets import TARGETS, Target, resident_warps
from bitnet_triton.runtime.launch import Launch, record_launches

__all__ = [
    "TARGETS",
    "Resources",
    "compile_for",
    "compile_launch",
    "describe",
    "digest_of",
    "markdown_table",
    "record_launches",
]

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.uint16: "*u16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# whether launches overlap (runtime/overlap.py): a column has them all one way
_BY_TARGET = ("DEPENDENT", "launch_pdl")
_MATRIX_INSTRUCTION = re.compile(
    r"\b(wgmma\.mma_async\.sync\.aligned\.\S+|tcgen05\.mma\.\S+|mma\.sync\.aligned\.\S+|v_mfma_\w+)"
)
_FLOAT_ROUNDING = re.compile(r"\b(?:mul\.rn|fma\.rn)\.f32\b")
# what matters to launches that overlap, in the machine code of NVIDIA GPUs: global memory by
# whatever instruction; shared memory has others
_EVENTS = re.compile(
    r"(?P<prefetch>\bCCTL\.E\.PF2)|(?P<wait>ACQBULK)|(?P<release>PREEXIT)|"
    r"(?P<memory>\b(?:LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED|REDG|UTMA\w*|UBLK\w*|CCTL\w*)\b)"
)


@dataclass(frozen=True)
class Resources:
    """What one kernel, with one signature and one set of tiles, costs on one target.

    Attributes:
        kernel: its name, without the leading underscore and ``_kernel``.
        target: "sm_90" for instance.
        dtypes: of its tensor arguments, in order.
        constants: compile-time arguments, ``num_warps`` and ``num_stages``.
        registers: a thread (of a lane: VGPRs on AMD).
        spills: bytes that a thread has in local memory (registers that it spills, on AMD).
        shared: bytes of shared memory of a program.
        warps: that registers and shared memory allow at once on a multiprocessor.
        instructions: the matrix instructions in its code, each once.
        rounding: its multiplications of float32 by name, each once: whether any is fused. Of
            NVIDIA GPUs, as all that follows.
        events: what it does in the order of its machine code, without repetitions, where launches
            overlap: "prefetch", "release" the next launch, "wait" for the one before, "memory".
    """

    kernel: str
    target: str
    dtypes: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    registers: int
    spills: int
    shared: int
    warps: int
    instructions: tuple[str, ...]
    rounding: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


def compile_launch(launch: Launch, target: Target) -> Any:
    """Compile the kernel of ``launch``, specialised as the launch would be.

    Args:
        launch: recorded by ``record_launches``.
        target: one of ``TARGETS``.

    Returns:
        Triton's compiled kernel, with its code in ``asm``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialisation(launch)
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options=_options(launch))


def digest_of(launch: Launch, target: Target) -> str:
    """Hash all that ``compile_launch`` depends on."""
    gpu = target.backend, target.arch, target.warp_size
    return digest(launch.kernel, gpu, *_specialisation(launch), sorted(_options(launch).items()))


def describe(launch: Launch, target: Target) -> dict[str, Any]:
    """Return the fields of ``Resources`` that the launch itself tells."""
    given = _arguments(launch)
    types = _signature(launch).values()
    return {
        "kernel": launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        "target": target.name,
        "dtypes": tuple(t[1:] for t in types if t.startswith("*")),
        "constants": (*((n, given[n]) for n in _constants(launch)), *_options(launch).items()),
    }


def compile_for(launch: Launch, target: Target) -> Resources:
    """Compile as ``compile_launch`` does, and read what the kernel costs."""
    compiled = compile_launch(launch, target)
    registers, spills, code = (_nvidia if target.backend == "cuda" else _amd)(compiled)
    overlaps = target.backend == "cuda" and _options(launch).get("launch_pdl", False)
    shared = compiled.metadata.shared
    return Resources(
        **describe(launch, target),
        registers=registers,
        spills=spills,
        shared=shared,
        warps=resident_warps(target, compiled.metadata.num_warps, registers, shared),
        instructions=tuple(sorted(set(_MATRIX_INSTRUCTION.findall(code)))),
        rounding=tuple(sorted(set(_FLOAT_ROUNDING.findall(code)))),
        events=_events(compiled) if overlaps else (),
    )


def _specialisation(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Return the types, the constants, and what is known of the other arguments."""
    given, constants = _arguments(launch), _constants(launch)
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(launch.kernel.arg_names)
        if n not in constants and _is_aligned(given[n])
    }
    return _signature(launch), {n: given[n] for n in constants}, attributes


def _arguments(launch: Launch) -> dict[str, Any]:
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.args))
    return given | {name: v for name, v in launch.options.items() if name in names}


def _options(launch: Launch) -> dict[str, Any]:
    return {n: v for n, v in launch.options.items() if n not in launch.kernel.arg_names}


def _constants(launch: Launch) -> list[str]:
    declared = {launch.kernel.arg_names[i] for i in launch.kernel.constexprs}
    given = _arguments(launch)
    return [n for n in launch.kernel.arg_names if n in declared or _is_specialised(given[n])]


def _signature(launch: Launch) -> dict[str, str]:
    given, constants = _arguments(launch), _constants(launch)
    return {
        name: "constexpr" if name in constants else _type(given[name])
        for name in launch.kernel.arg_names
    }


def _is_specialised(value: Any) -> bool:
    """Tell whether Triton compiles an argument as a constant, though it is declared as none."""
    return value is None or (type(value) is int and value == 1)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


def _nvidia(compiled: Any) -> tuple[int, int, str]:
    """Return registers, bytes of local memory, and PTX; the former of the binary that would run."""
    report = _read_binary(compiled, "cuobjdump", "--dump-resource-usage")
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return used["REG"], used["STACK"] + used["LOCAL"], compiled.asm["ptx"]


def _events(compiled: Any) -> tuple[str, ...]:
    """Read what happens in which order where no compiler moves anything any more."""
    text = _read_binary(compiled, "nvdisasm")
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.M)
    found = [str(event.lastgroup) for line in lines if (event := _EVENTS.search(line))]
    return tuple(event for event, _ in itertools.groupby(found))


def _read_binary(compiled: Any, tool: str, *options: str) -> str:
    """Return what a tool of the Triton wheel says about a kernel for an NVIDIA GPU."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        command = [str(path), *options, str(binary)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _amd(compiled: Any) -> tuple[int, int, str]:
    """Return VGPRs, spilled registers, and assembly."""
    code = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        found = re.search(rf"^\s*\.{field}:\s*(\d+)", code, re.M)
        assert found, field
        return int(found[1])

    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count"), code


def markdown_table(rows: Sequence[Resources]) -> str:
    """Write a Markdown table: a line for a kernel, its dtypes and tiles; a column for a target."""
    present = {row.target for row in rows}
    targets = [target for target in TARGETS if target in present]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        constants = " ".join(f"{n}={value}" for n, value in row.constants if n not in _BY_TARGET)
        numbers = f"{row.registers}, {row.spills}, {row.shared}, {row.warps}"
        cell = f"{numbers}, {_short(row.instructions)}"
        key = (row.kernel, " ".join(row.dtypes), constants)
        lines.setdefault(key, {})[row.target] = cell
    table = [["kernel", "tensors", "constants", *targets], ["---"] * (3 + len(targets))]
    table += [
        [*key, *(cells.get(target, "") for target in targets)] for key, cells in lines.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _short(instructions: Sequence[str]) -> str:
    """Name family and operand of matrix instructions: "wgmma s8", "mfma bf16", "tcgen05 f16"."""
    names = []
    for instruction in instructions:
        family, *_, operand = re.split(r"[._]", instruction.removeprefix("v_").removesuffix(".s32"))
        if kind := re.search(r"kind::(\w+)", instruction):
            operand = kind[1]  # of tcgen05: 16 bits of either format are "f16"
        names.append(f"{family} {'bf16' if '.bf16' in instruction else operand}")
    return " + ".join(dict.fromkeys(names)) or "-"
