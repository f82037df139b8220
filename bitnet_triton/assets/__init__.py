"""Files that ship with the package: the embedded models."""

from pathlib import Path

TINY_MODEL = Path(__file__).parent / "tiny"
RECALL_MODEL = Path(__file__).parent / "recall"
