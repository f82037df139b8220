"""Files that ship with the package: the embedded models."""

from pathlib import Path

TINY_MODEL = Path(__file__).parent / "tiny"
RECALL_MODEL = Path(__file__).parent / "recall"

# By the names that every command knows them by
MODELS = {"recall": RECALL_MODEL, "tiny": TINY_MODEL}


def embedded(name: str) -> str:
    """Return the folder of an embedded model; any other name as it is.

    A folder of the user's own that has such a name is meant by its path (``./tiny``).
    """
    return str(MODELS.get(name, name))
