"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs.

The kernels of a decode step take microseconds, about as long as a launch does. Since Hopper a
launch may overlap the kernel before it: programs become resident early, and wait there for what it
writes. Until then they may only do what no write can make wrong, such as fetching weights into the
second-level cache, where every multiprocessor sees what others write.

Every kernel that is launched this way waits, whatever its arguments are. So whoever waits for a
kernel knows that all of those before it have ended too, and memory may be used again as always.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitnet_triton.runtime.overlap import can_overlap

_LINE_BYTES = tl.constexpr(128)
# that a program asks for at once
_LINES = tl.constexpr(128)
_OVERLAPPED = {"DEPENDENT": True, "launch_pdl": True}
_IN_ORDER = {"DEPENDENT": False}


def dependent(device: torch.device) -> dict[str, bool]:
    """Return the options of a launch whose kernel begins with ``wait_for_inputs``."""
    return _OVERLAPPED if can_overlap(device) else _IN_ORDER


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr) -> None:
    """Let the next kernel start, and wait until the one before has ended and its writes are seen.

    Nothing may be loaded or stored before this.
    """
    if DEPENDENT:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, 0;",
            "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def prefetch_rows(ptr, first, R, row_bytes, BLOCK_R: tl.constexpr, DEPENDENT: tl.constexpr) -> None:
    """Ask for rows ``first`` .. first + BLOCK_R of R to come into the second-level cache.

    Without a wait behind it there is nothing to gain, and nothing happens.
    """
    if DEPENDENT:
        # int64: row * bytes overflows int32 from 2**31 bytes on
        address = ptr.to(tl.int64) + first.to(tl.int64) * row_bytes
        size = tl.minimum(BLOCK_R, R - first) * row_bytes
        for start in range(0, size, _LINES * _LINE_BYTES):
            # lanes with no line left ask for the last one again
            at = tl.minimum(start + tl.arange(0, _LINES) * _LINE_BYTES, size - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address + at],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
