"""transformers' own test mixins, from the source distribution that ``fetch.py`` unpacks.

PyPI's source distribution carries ``tests/test_*.py`` and nothing below ``tests``: the mixins for
models, training and configs are there, those for generation and for export are not, and stand-ins
without a test take their place. A folder ``tests`` of a checkout of transformers, named by the
environment variable ``TRANSFORMERS_TESTS``, has them all.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import transformers

VARIABLE = "TRANSFORMERS_TESTS"
PACKAGE = "transformers_own_tests"
# module: what others import from it, and what they get where it is absent
ABSENT = {
    "generation.test_utils": ("GenerationTesterMixin", type),
    "exporters.test_export": ("ExportTesterMixin", type),
    "utils.test_configuration_utils": ("config_common_kwargs", dict),
}


def folder() -> Path:
    """Return where transformers' tests are, or would be."""
    name = f"transformers-{transformers.__version__}"
    fetched = Path(__file__).parents[2] / ".peer" / name / "tests"
    return Path(os.environ.get(VARIABLE) or fetched)


def objection() -> str | None:
    """Say why transformers' tests cannot run here; None when they can."""
    if not (folder() / "test_modeling_common.py").exists():
        return f"no tests of transformers {transformers.__version__}: python tests/peer/fetch.py"
    if importlib.util.find_spec("parameterized") is None:
        return "parameterized is missing: pip install -e .[dev]"
    return None


def has(name: str) -> bool:
    """Tell whether a mixin is transformers' own, and no stand-in."""
    return all(_path(module).exists() for module, (known, _) in ABSENT.items() if known == name)


def load(module: str) -> types.ModuleType:
    """Import a module of transformers' tests, ``test_modeling_common`` for one."""
    if PACKAGE not in sys.modules:
        _add_package(PACKAGE, folder())
        for absent, (name, kind) in ABSENT.items():
            if not _path(absent).exists():
                _add_stand_in(absent, name, type(name, (), {}) if kind is type else kind())
    return importlib.import_module(f"{PACKAGE}.{module}")


def _path(module: str) -> Path:
    return folder() / (module.replace(".", "/") + ".py")


def _add_stand_in(module: str, name: str, value: object) -> None:
    parent = module.rpartition(".")[0]
    _add_package(f"{PACKAGE}.{parent}", folder() / parent)
    stand_in = types.ModuleType(f"{PACKAGE}.{module}")
    setattr(stand_in, name, value)
    sys.modules[stand_in.__name__] = stand_in


def _add_package(name: str, path: Path) -> None:
    package = types.ModuleType(name)
    package.__path__ = [str(path)]
    sys.modules[name] = package
