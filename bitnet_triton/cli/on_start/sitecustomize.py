"""What every Python started under ``bitnet-triton run`` executes first; its folder is on the path.

It imports nothing by itself: ``enable()`` follows the import of transformers, so that a process
which has no use for models starts as fast as ever.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).resolve().parent


class _EnablingLoader(Loader):
    """Loads transformers as its own loader does, and then calls ``enable()``."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module."""
        self._loader.exec_module(module)
        if importlib.util.find_spec("bitnet_triton") is None:
            sys.stderr.write(
                f"bitnet-triton run: {sys.executable} has no bitnet_triton; transformers stays as "
                "it is in this process\n"
            )
            return
        import bitnet_triton

        bitnet_triton.enable()


class _Finder(MetaPathFinder):
    """Finds transformers once, where it would be found anyway."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of transformers with a loader that enables, None for other modules."""
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _EnablingLoader(spec.loader)
        return spec


def _run_the_one_behind() -> None:
    """Run the ``sitecustomize`` that this one stands in front of, if there is one."""
    behind = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
    spec = PathFinder.find_spec("sitecustomize", behind)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


sys.meta_path.insert(0, _Finder())
_run_the_one_behind()
