"""The text that facts are hidden in: the documentation strings of the standard library."""

from __future__ import annotations

import ast
import functools
import hashlib
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_PERCENT = 10
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "__pycache__", "test", "tests"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(*, held_out: bool) -> Iterator[str]:
    """Yield the documentation of each file of one part, in the order of names.

    A hash of the name says which part a file belongs to, so that what a model was trained on is
    told from what it is measured on, alike on every machine.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        percent = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 100
        if (percent < HELD_OUT_PERCENT) != held_out or not _SKIPPED_FOLDERS.isdisjoint(name.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old files have escapes that Python warns of
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # files that show what is wrong on purpose
            continue
        found = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, _DOCUMENTED)]
        if text := "\n\n".join(filter(None, found)):
            yield text


@functools.cache  # parsing all these files takes seconds
def documentation(*, held_out: bool) -> str:
    """Return the documentation of all files of one part."""
    return "\n\n".join(docstrings(held_out=held_out))


class Haystack:
    """Tokens of text, of which each prompt gets a stretch of its own."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def stretch(self, rng: random.Random, length: int) -> list[int]:
        """Return so many tokens from a random place on; the text goes round."""
        start = rng.randrange(len(self.ids))
        found = self.ids[start : start + length]
        while len(found) < length:
            found += self.ids[: length - len(found)]
        return found
