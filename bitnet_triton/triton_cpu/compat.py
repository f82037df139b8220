"""The one place that knows versions of Triton; 3.6 to 3.9 differ in a handful of calls."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

OLDEST = (3, 6)
NEWEST_TESTED = (3, 9)


@functools.cache
def version() -> str | None:
    """Return the version of the installed Triton, or None; imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # builds of PyTorch bring it under a name
        return importlib.metadata.version("pytorch-triton")


def release(text: str) -> tuple[int, int]:
    """Return major and minor number of a version such as ``3.7.1+git12ab``."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def supported() -> str | None:
    """Say why the installed Triton cannot be used; None when it can, or is worth a try."""
    installed = version()
    if installed is None:
        return "Triton is not installed"
    if not sys.platform.startswith("linux"):
        return f"Triton kernels run on the CPU under Linux, not under {sys.platform}"
    if release(installed) < OLDEST:
        return (
            f"Triton {installed} is too old, {'.'.join(map(str, OLDEST))} is the oldest that works"
        )
    return None


def tested() -> bool:
    """Tell whether the tests have run on the installed Triton; another one needs a self-test."""
    installed = version()
    return installed is not None and OLDEST <= release(installed) <= NEWEST_TESTED


def active_driver() -> Any:
    """Return the driver that Triton uses now, or None where it has not looked for one yet."""
    from triton.runtime import driver

    return driver._active


def set_active_driver(new: Any) -> None:
    """Make ``new`` Triton's driver; with None, Triton looks for one when it needs it."""
    from triton.runtime import driver

    driver.set_active(new)


def make_binder(fn: Any, backend: Any) -> Callable[..., tuple[dict[str, Any], list, dict]]:
    """Return a function that takes the arguments of a launch of the jitted ``fn``.

    It returns the bound arguments, the specialisation of each, and what is left over: options.
    """
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(fn.signature, fn.params, backend)


def pack_arguments(
    fn: Any, backend: Any, kwargs: dict[str, Any], bound: dict[str, Any], special: list, rest: dict
) -> tuple[Any, dict, dict, dict]:
    """Return options, signature, constants and attributes, as ``triton.compile`` wants them."""
    return fn._pack_args(backend, kwargs, bound, special, rest)


def runtime_knobs() -> Any:
    """Return Triton's settings at run time; ``debug`` asks for assertions in all kernels."""
    from triton import knobs

    return knobs.runtime


def implied_options() -> dict[str, Any]:
    """Return the options that Triton itself adds to those of every launch."""
    from triton import knobs

    names = ("instrumentation_mode", "fpsan_homomorphic_casts")
    values = {name: getattr(knobs.compilation, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def cache_directory() -> str:
    """Return where Triton keeps compiled kernels."""
    from triton import knobs

    return knobs.cache.dir


def run_passes(manager: Any, module: Any, name: str) -> None:
    """Run a pass manager; some versions take the name of the pipeline, others do not."""
    try:
        manager.run(module, name)
    except TypeError:
        manager.run(module)


def generic_text(module: Any) -> str:
    """Print ``module`` in MLIR's generic form, with locations.

    A module that fails verification is printed in the generic form, which has one grammar for
    every operation. An attribute of no dialect on the module makes it fail.
    """
    from triton._C.libtriton import ir

    module.set_attr("tcpu_generic", ir.builder(module.context).get_int32_attr(1))
    return module.str()


def argument_types(text: str) -> list[str]:
    """Return the MLIR types of the public function's arguments in generic text."""
    for properties in re.findall(r'"tt\.func"\(\) <\{(.*)\}> \(\{', text):
        if 'sym_visibility = "public"' in properties or "sym_visibility" not in properties:
            start = properties.index("function_type = (") + len("function_type = (")
            return _split(properties[start : _closing(properties, start)])
    raise ValueError("the module has no public function")


def _closing(text: str, start: int) -> int:
    depth = 1
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses in {text!r}")


def _split(text: str) -> list[str]:
    """Split at the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def descriptor_values(descriptor: Any) -> list[Any]:
    """Return the values that a host tensor descriptor is passed as, in the kernel's order."""
    flags = [descriptor.padding == "nan"]
    if hasattr(descriptor, "round_f32_to_tf32"):  # from 3.7 on
        flags.append(descriptor.round_f32_to_tf32)
    shape, strides = list(descriptor.shape), list(descriptor.strides)
    return [descriptor.base, *shape, *strides, *flags, *shape, *strides]


def descriptor_types(signature: str) -> list[str]:
    """Return the types of those values, for a signature like ``tensordesc<fp16[64, 64]>``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    found = re.match(r"tensordesc<([^[>]+)\[([^\]]*)\]", signature)
    if found is None:
        raise NotImplementedError(f"tensor descriptor of type {signature}")
    rank = found[2].count(",") + 1
    flags = 1 + ("round_f32_to_tf32" in inspect.signature(TensorDescriptor).parameters)
    return [
        "*" + found[1],
        *["i64"] * (2 * rank),
        *["i1"] * flags,
        *["i32"] * rank,
        *["i64"] * rank,
    ]
