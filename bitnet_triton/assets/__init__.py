"""Files that ship with the package: the embedded model."""

from pathlib import Path

TINY_MODEL = Path(__file__).parent / "tiny"
