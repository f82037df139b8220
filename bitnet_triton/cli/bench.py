"""``bitnet-triton bench``: hand over to the benchmarks that lie beside a source checkout."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import typer

import bitnet_triton

# Everything, --help included, belongs to the benchmarks' own command line
CONTEXT_SETTINGS = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source checkout, as `python -m bench` does.

    Example: `bitnet-triton bench ternary_linear`

    The benchmarks come with the source, not with the installed package: get the source, then
    `pip install -e ".[bench]"` in its folder.
    """
    try:
        load_benchmarks(Path(bitnet_triton.__file__).parent.parent)
    except FileNotFoundError:
        if {"--help", "-h"}.isdisjoint(context.args) and context.args:
            raise
        typer.echo(context.get_help())
        return
    commands = importlib.import_module("bench.__main__")
    commands.main(context.args, "bitnet-triton bench")


def load_benchmarks(checkout: Path) -> ModuleType:
    """Import the package ``bench`` of ``checkout``, never another one of that name.

    Args:
        checkout: the folder that holds the package ``bitnet_triton``.

    Raises:
        FileNotFoundError: the folder is no source checkout.
        RuntimeError: another module called ``bench`` is imported already.
    """
    source = checkout / "bench" / "__init__.py"
    project = checkout / "pyproject.toml"
    is_ours = project.is_file() and 'name = "bitnet-triton"' in project.read_text(encoding="utf-8")
    if not (is_ours and source.is_file()):
        raise FileNotFoundError(
            "benchmarks come with the source checkout, not with the installed package; get the "
            "source, `pip install -e '.[bench]'` in its folder, and run `python -m bench` there"
        )
    imported = sys.modules.get("bench")
    if imported is not None:
        if Path(imported.__file__ or "").resolve() != source.resolve():
            raise RuntimeError("another module called `bench` is imported already")
        return imported
    spec = importlib.util.spec_from_file_location(
        "bench", source, submodule_search_locations=[str(source.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)
    return module
