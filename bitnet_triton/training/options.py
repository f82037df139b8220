"""Options of a training: from flags, from a YAML file, and in the folder that a run goes on in."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # transformers brings it


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Read options from a YAML file: a mapping of names to values.

    Raises:
        ValueError: there is no such file, or it is no mapping.
    """
    wanted = "`config`: expected a YAML file with options by name"
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{wanted}, got {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{wanted}, got {path}: {reason}") from error
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{wanted}, got {path}, which holds a {type(found).__name__}")
    return {name.replace("-", "_"): _numbers(value) for name, value in found.items()}


def _numbers(value: Any) -> Any:
    """Read `1e-4` as people mean it: YAML 1.1 takes it for a word, as it has no point."""
    if isinstance(value, Mapping):
        return {name: _numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value)
    return float(value) if is_number else value


def read_json(path: str, option: str) -> dict[str, Any]:
    """Read a file that has an object as JSON.

    Raises:
        ValueError: there is no such file, or it has none; the message names ``option``.
    """
    wanted = f"`{option}`: expected a file with an object as JSON"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}")  # noqa: TRY301
    except OSError as error:
        raise ValueError(f"{wanted}, got {path}: {error.strerror}") from error
    except (TypeError, ValueError) as error:  # no object, no JSON, or no UTF-8
        raise ValueError(f"{wanted}, got {path}: {error}") from error
    return found


def check_names(options: Mapping[str, Any], kind: type) -> None:
    """Raise ValueError, with the nearest known name, for an option that ``kind`` does not have."""
    known = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
            raise ValueError(f"`config`: unknown option {name!r}{hint}")


def check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None,
    most: float | None = None, whole: bool = False,
) -> None:  # fmt: skip
    """Raise unless an option is a number within its limits.

    Raises:
        TypeError: it is no number, or has a fraction where it may not.
        ValueError: it is out of range.
    """
    kinds = int if whole else (int, float)
    noun = "an integer" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"`{name}`: expected {noun}, got {value!r}")
    limits = [("of at least", least), ("above", above), ("up to", most)]
    wanted = " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None)
    fits = (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    )
    if not fits:
        raise ValueError(f"`{name}`: expected {noun} {wanted}, got {value}")


def remember(folder: Path, run: Mapping[str, Any]) -> None:
    """Write what a run is to its folder, or check that the folder holds the same run.

    ``output`` is how the folder was spelled, and no part of it.

    Raises:
        ValueError: the folder holds another run, or other files.
    """
    plain = json.loads(json.dumps({k: v for k, v in run.items() if k != "output"}))
    path = folder / "run.json"
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in plain if known.get(name) != plain[name]]
        if other:
            raise ValueError(
                f"`output`: {folder} holds a run with other {', '.join(other)} (files and models "
                "go by what they hold); choose a new folder, or repeat that run to go on with it"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`output`: expected a new folder, or one of a run, got {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plain, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"`output`: cannot write to {folder}: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
