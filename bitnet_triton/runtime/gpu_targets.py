"""The GPUs that kernels are compiled for ahead of time, and how many warps of one fit on them.

Limits of NVIDIA are those of the table "technical specifications per compute capability" of the
CUDA programming guide; those of AMD are those of the CDNA 3 instruction set guide.
"""

from __future__ import annotations

from dataclasses import dataclass

KB = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on one multiprocessor (compute unit, on AMD) share.

    Attributes:
        warps: most that are resident (waves of 64 lanes, on AMD).
        programs: most that are resident.
        shared: bytes of shared memory.
        reserved: bytes of it that the system keeps of each program.
        largest: bytes that one program may have.
        registers: of 32 bits, of all lanes.
        unit: registers of a warp are handed out in multiples of that many.
    """

    warps: int
    programs: int
    shared: int
    reserved: int
    largest: int
    registers: int
    unit: int


@dataclass(frozen=True)
class Target:
    """A GPU to compile for; the first three are the arguments of Triton's GPUTarget."""

    backend: str
    arch: int | str
    warp_size: int
    has: Multiprocessor

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


def _nvidia(arch: int, warps: int, programs: int, shared_kb: int) -> Target:
    largest = shared_kb * KB - KB
    limits = Multiprocessor(warps, programs, shared_kb * KB, KB, largest, 64 * KB, 256)
    return Target("cuda", arch, 32, limits)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _nvidia(80, warps=64, programs=32, shared_kb=164),
        _nvidia(90, warps=64, programs=32, shared_kb=228),
        _nvidia(100, warps=64, programs=32, shared_kb=228),
        _nvidia(120, warps=48, programs=24, shared_kb=100),
        # four units of 512 registers for each of 64 lanes
        Target("hip", "gfx942", 64, Multiprocessor(32, 32, 64 * KB, 0, 64 * KB, 128 * KB, 512)),
    )
}


def resident_warps(target: Target, num_warps: int, registers: int, shared: int) -> int:
    """Return how many warps of a kernel are resident on a multiprocessor at once; 0: it cannot run.

    Args:
        target: whose multiprocessor.
        num_warps: of one program.
        registers: of a thread.
        shared: bytes of shared memory of a program.
    """
    has = target.has
    if shared > has.largest:
        return 0
    of_warp = -(-registers * target.warp_size // has.unit) * has.unit
    # a warp belongs to one of four schedulers, which have a quarter of the registers each
    by_registers = 4 * (has.registers // 4 // of_warp) // num_warps
    by_shared = has.shared // max(shared + has.reserved, 1)
    return num_warps * min(has.warps // num_warps, has.programs, by_registers, by_shared)
