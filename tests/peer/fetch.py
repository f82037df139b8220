"""Fetch the tests of the transformers that is installed: ``python tests/peer/fetch.py``.

pip downloads the source distribution; its folder ``tests`` goes to ``.peer/``, which git ignores.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".peer"


def fetch(folder: Path = FOLDER) -> Path:
    """Download the tests of the installed transformers, and return where they are."""
    name = f"transformers-{version('transformers')}"
    with tempfile.TemporaryDirectory() as download:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--no-binary", "transformers", "--dest", download),
            f"transformers=={version('transformers')}",
        ]
        subprocess.run(command, check=True)
        with tarfile.open(Path(download) / f"{name}.tar.gz") as archive:
            tests = [m for m in archive if m.isfile() and m.name.startswith(f"{name}/tests/")]
            archive.extractall(folder, members=tests, filter="data")
    # a checkout has one, and a test reads it
    (folder / name / "tests" / "__init__.py").touch()
    return folder / name / "tests"


if __name__ == "__main__":
    sys.stdout.write(f"{fetch()}\n")
