"""``bitnet-triton doctor``: what runs where on this machine, and why."""

from __future__ import annotations


def doctor() -> None:
    """Say what runs where."""
