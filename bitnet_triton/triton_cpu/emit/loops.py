"""Loop nests: written a second time, without their masks, where these can be decided at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from bitnet_triton.triton_cpu.emit.emitter import Emitter
from bitnet_triton.triton_cpu.emit.masks import holds_everywhere, outermost
from bitnet_triton.triton_cpu.emit.nest import (
    NOTHING_ASSUMED,
    Assumption,
    Index,
    Nest,
    loop_pragmas,
)
from bitnet_triton.triton_cpu.emit.split import split_loop


def write_loops(
    emitter: Emitter,
    sizes: tuple[int, ...],
    body: Callable[[Nest, Index], None],
    order: tuple[int, ...] | None = None,
    *,
    independent: bool = True,
) -> None:
    """Write a loop nest over ``sizes``.

    Where the conditions that ``body`` meets can be decided for all elements at once, the nest
    is written a second time without them, and the choice is made at run time.

    Args:
        emitter: writes the code.
        sizes: number of trips of every dimension.
        body: writes the statements for one index into the nest.
        order: dimensions, outermost first.
        independent: the trips of the innermost loop may run in any order.
    """
    nest, names = _fill(emitter, sizes, body, order, NOTHING_ASSUMED)
    masks = outermost(emitter, nest.masks)
    if not masks:
        _write_nest(emitter, nest, names, sizes, independent)
        return
    found = [holds_everywhere(emitter, mask) for mask in masks]
    conditions = " && ".join(dict.fromkeys(c for c in found if c and c != "true"))
    fast = _fill(emitter, sizes, body, order, Assumption(granted=frozenset(masks)))
    if not conditions:
        _write_nest(emitter, *fast, sizes, independent)
        return
    inner = list(names)[-1:]
    split = None
    if inner and independent:
        met = {mask: nest.masks[mask] for mask in masks}
        split = split_loop(emitter, met, names[inner[0]], sizes[inner[0]])
    with emitter.braces(f"if ({conditions})"):
        _write_nest(emitter, *fast, sizes, independent)
    if split is not None:
        with emitter.braces("else" if split.is_certain else f"else if ({split.condition})"):
            for first, end, assumed in split.parts():
                part = _fill(emitter, sizes, body, order, assumed)
                _write_nest(emitter, *part, sizes, independent, (first, end))
    if split is None or not split.is_certain:
        with emitter.braces("else"):
            _write_nest(emitter, nest, names, sizes, independent)


def _fill(
    emitter: Emitter,
    sizes: tuple[int, ...],
    body: Callable[[Nest, Index], None],
    order: tuple[int, ...] | None,
    assumed: Assumption,
) -> tuple[Nest, dict[int, str]]:
    names = {d: emitter.fresh("i") for d in order or range(len(sizes)) if sizes[d] > 1}
    nest = Nest(emitter, len(names), assumed)
    nest.depth_of.update({name: level + 1 for level, name in enumerate(names.values())})
    body(nest, tuple(names.get(d, "0") for d in range(len(sizes))))
    return nest, names


def _write_nest(
    emitter: Emitter,
    nest: Nest,
    names: dict[int, str],
    sizes: tuple[int, ...],
    independent: bool,
    innermost: tuple[str, str] | None = None,
) -> None:
    """Write the loops, the innermost from its first trip to its end, or all of it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(emitter.braces())
        for line in nest.levels[0]:
            emitter.write(line)
        for level, (dim, name) in enumerate(names.items(), 1):
            if level == len(names):
                for pragma in loop_pragmas(sizes[dim], independent=independent):
                    emitter.write(pragma)
            first, end = "0", str(sizes[dim])
            if innermost and level == len(names):
                first, end = innermost
            head = f"for (int {name} = {first}; {name} < {end}; ++{name})"
            stack.enter_context(emitter.braces(head))
            for line in nest.levels[level]:
                emitter.write(line)
