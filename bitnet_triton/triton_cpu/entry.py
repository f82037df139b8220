"""What a compiled kernel offers to those who run it: a launch, and many of them in a row."""

from __future__ import annotations

import ctypes

from bitnet_triton.triton_cpu import build


class Entry:
    """The entry point of a loaded kernel."""

    __slots__ = ("address", "message", "replay", "run")

    def __init__(self, binary: bytes) -> None:
        library = build.load(binary)
        # without prototypes, ctypes converts in a third of the time: int to int, bytes to char*
        self.run = library.tcpu_launch
        self.message = library.tcpu_message
        self.message.restype = ctypes.c_char_p
        self.replay = library.tcpu_replay
        self.replay.restype = ctypes.c_long
        self.address = ctypes.cast(self.run, ctypes.c_void_p).value

    def failure(self, name: str) -> str:
        """Return what the last launch of this thread said when it failed."""
        return f"kernel {name}: {(self.message() or b'').decode(errors='replace')}"
