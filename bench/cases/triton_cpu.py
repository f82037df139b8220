"""Triton kernels that were compiled for the CPU, against what PyTorch has for the same.

Attention, matrix products, the kernel of the ternary linear alone (without quantisation), softmax,
an addition, and the launch of a kernel that does next to nothing. With --interpreter: how much
faster a compiled kernel is than Triton's own interpreter, on smaller sizes. The kernels stand in
bench/triton_kernels.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, PeerMissingError, Point, Provider, Settings, Work
from bench.machine import copies_beyond_cache
from bench.measure import relative_error
from bitnet_triton import triton_cpu
from bitnet_triton.kernels import TernaryWeight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# STYLE: largest relative RMS error against float64
TOLERANCE = {"fp32": 2e-6, "bf16": 8e-3, "int8": 0.0}

# What the points of an op are, by the name of a size
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "full": {
        "attention": {"B": 1, "H": 8, "T": 1024, "D": 64},
        "product": {"M": 1024, "N": 1024, "K": 1024},
        "ternary_row": {"M": 1, "N": 6912, "K": 2560},
        "ternary": {"M": 512, "N": 6912, "K": 2560},
        "softmax": {"M": 4096, "N": 1000},
        "add": {"N": 2**22},
        "launch": {"N": 256},
    },
    "interpreter": {
        "attention": {"B": 1, "H": 2, "T": 512, "D": 64},
        "product": {"M": 512, "N": 512, "K": 512},
        "softmax": {"M": 512, "N": 1000},
        "add": {"N": 2**19},
    },
    "tiny": {
        "attention": {"B": 1, "H": 2, "T": 40, "D": 16},
        "product": {"M": 33, "N": 48, "K": 40},
        "ternary_row": {"M": 1, "N": 48, "K": 64},
        "ternary": {"M": 33, "N": 48, "K": 64},
        "softmax": {"M": 5, "N": 100},
        "add": {"N": 1000},
        "launch": {"N": 256},
    },
}


@dataclass(frozen=True)
class Op:
    """A computation, and who can do it.

    Attributes:
        size: its key in the tables of ``SIZES``.
        dtypes: names of those that it is measured in.
        draw: takes a function that draws a tensor, and the sizes; returns the tensors.
        ours: takes the module of the kernels and the tensors; returns the call.
        torch: takes the tensors; returns the call.
        exact: takes the tensors in float64; returns the result.
        flops: takes the sizes.
        caches: "hot", a call finds its operands where the call before left them; "cold", it does
            not.
    """

    size: str
    dtypes: tuple[str, ...]
    draw: Callable[..., tuple[Tensor, ...]]
    ours: Callable[..., partial[Tensor]]
    torch: Callable[..., partial[Tensor]]
    exact: Callable[..., Tensor]
    flops: Callable[..., float]
    caches: tuple[str, ...] = ("hot",)


def _attention(causal: bool) -> Op:
    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T, D = q.shape[-2:]
        scores = q @ k.transpose(-1, -2) * D**-0.5
        if causal:
            hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(-1) @ v

    return Op(
        "attention",
        ("fp32", "bf16"),
        draw=lambda new, B, H, T, D: tuple(new(B, H, T, D) for _ in range(3)),
        ours=lambda kernels, q, k, v: partial(kernels.attention, q, k, v, causal=causal),
        torch=lambda q, k, v: partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal),
        exact=exact,
        flops=lambda B, H, T, D: (2 if causal else 4) * B * H * T * T * D,
    )


def _product(transposed: bool) -> Op:
    """Return a [M, K] times b: as a linear layer stores it, [N, K], or as [K, N]."""

    def draw(new: Callable[..., Tensor], M: int, N: int, K: int) -> tuple[Tensor, ...]:
        return new(M, K), new(N, K) if transposed else new(K, N)

    def view(b: Tensor) -> Tensor:
        return b.t() if transposed else b

    def by_torch(a: Tensor, b: Tensor) -> partial[Tensor]:
        if a.dtype == torch.int8:
            return partial(torch._int_mm, a, view(b))
        return partial(F.linear, a, b) if transposed else partial(torch.mm, a, b)

    return Op(
        "product",
        ("fp32", "bf16", "int8"),
        draw=draw,
        ours=lambda kernels, a, b: partial(kernels.matmul, a, view(b)),
        torch=by_torch,
        exact=lambda a, b: a @ view(b),
        flops=lambda M, N, K: 2 * M * N * K,
    )


def _ternary(size: str) -> Op:
    """Return integers a [M, K] times ternary weights [N, K]: packed for us, bf16 for PyTorch."""

    def draw(new: Callable[..., Tensor], M: int, N: int, K: int) -> tuple[Tensor, ...]:
        return (new(M, K) * 40).round().clamp(-127, 127), new(N, K).round().clamp(-1, 1)

    def ours(_: ModuleType, a: Tensor, w: Tensor) -> partial[Tensor]:
        from bitnet_triton.kernels.ternary_linear.forward import launch_ternary_linear_fwd

        weight = TernaryWeight.from_codes(w.to(torch.int8), 1.0)
        codes = a.to(torch.int8)
        sums = codes.sum(-1, dtype=torch.int32)
        ones = torch.ones(a.shape[0])
        packed = weight.packed
        rest = (packed, weight.scale, None, None, (packed.shape[0],), torch.bfloat16)
        return partial(launch_ternary_linear_fwd, codes, ones, sums, *rest)

    return Op(
        size,
        ("bf16",),
        draw=draw,
        ours=ours,
        torch=lambda a, w: partial(F.linear, a, w),
        exact=lambda a, w: a @ w.t(),
        flops=lambda M, N, K: 2 * M * N * K,
        # a model that decodes reads its weights from memory
        caches=("hot", "cold") if size == "ternary_row" else ("hot",),
    )


def _add(size: str) -> Op:
    return Op(
        size,
        ("fp32",),
        draw=lambda new, N: (new(N), new(N)),
        ours=lambda kernels, x, y: partial(kernels.add, x, y, torch.empty_like(x)),
        torch=lambda x, y: partial(torch.add, x, y, out=torch.empty_like(x)),
        exact=lambda x, y: x + y,
        flops=lambda N: N,
    )


def _recorded(op: Op) -> Op:
    """Return the same without Python in between: a launch that was recorded is replayed."""

    def replay(graph: Any, result: Tensor, *_: Any) -> Tensor:
        graph.replay()
        return result

    def ours(kernels: ModuleType, *tensors: Tensor) -> partial[Tensor]:
        call = op.ours(kernels, *tensors)
        call()  # compiles
        with triton_cpu.capture() as graph:
            result = call()
        return partial(replay, graph, result, *call.args)

    return dataclasses.replace(op, ours=ours)


OPS = {
    "attention_causal": _attention(causal=True),
    "attention_full": _attention(causal=False),
    "linear": _product(transposed=True),
    "matmul": _product(transposed=False),
    "ternary_row": _ternary("ternary_row"),
    "ternary_row_recorded": _recorded(_ternary("ternary_row")),
    "ternary": _ternary("ternary"),
    "softmax": Op(
        "softmax",
        ("fp32",),
        draw=lambda new, M, N: (new(M, N),),
        ours=lambda kernels, x: partial(kernels.softmax, x, torch.empty_like(x)),
        torch=lambda x: partial(torch.softmax, x, -1, out=torch.empty_like(x)),
        exact=lambda x: x.softmax(-1),
        flops=lambda M, N: 4 * M * N,
    ),
    "add": _add("add"),
    "launch": _add("launch"),
    "launch_recorded": _recorded(_add("launch")),
}
# One of a kind is enough to see what compiling brings
_INTERPRETED = ("attention_causal", "linear", "softmax", "add")


@dataclass(frozen=True)
class Inputs:
    """One point: the tensors, and what made them."""

    point: Point
    settings: Settings
    tensors: tuple[Tensor, ...]

    @property
    def op(self) -> Op:
        """What is computed."""
        return OPS[self.point["op"]]

    @functools.cached_property
    def exact(self) -> Tensor:
        """The result in float64."""
        return self.op.exact(*(t.double() for t in self.tensors))


def make_inputs(op: str, dtype: str, cache: str, settings: Settings, **sizes: int) -> Inputs:
    """Draw floats from a normal distribution, integers from -127 to 127 with equal chance."""

    def new(*shape: int) -> Tensor:
        if dtype == "int8":
            return torch.randint(-127, 128, shape, dtype=torch.int8, generator=random)
        return torch.randn(shape, generator=random).to(DTYPES[dtype])

    random = settings.generator
    point = {"op": op, "dtype": dtype, "cache": cache, **sizes}
    return Inputs(point, settings, OPS[op].draw(new, **sizes))


def _checked(inputs: Inputs, output: Tensor) -> Tensor:
    """Hold a result to the limit of its dtype; a provider has only one for all its points."""
    limit = TOLERANCE[inputs.point["dtype"]]
    error = relative_error(output, inputs.exact)
    if not error <= limit:
        raise ValueError(f"relative error {error:.2g} exceeds {limit:.2g}")
    return output


def _work(
    inputs: Inputs, run: Callable[[], Tensor], output: Callable[[], Tensor], **details: Any
) -> Work:
    result = inputs.exact.numel() * (4 if inputs.point["dtype"] != "bf16" else 2)
    return Work(
        call=run,
        output=lambda: _checked(inputs, output()),
        read_bytes=sum(t.nbytes for t in inputs.tensors) + result,
        details={"limit_of_error": TOLERANCE[inputs.point["dtype"]], **details},
    )


def _kernels() -> ModuleType:
    """Import the kernels, and Triton with them."""
    from bench import triton_kernels

    return triton_kernels


def _in_turns(inputs: Inputs, make: Callable[..., partial[Tensor]], **details: Any) -> Work:
    """Call ``make``'s result; where the cache is to be cold, one result after another.

    They are as many as it takes for their operands to exceed the last-level cache four times.
    """
    run = make(*inputs.tensors)
    if inputs.point["cache"] == "hot":
        return _work(inputs, run, run, **details)
    held = sum(t.nbytes for t in run.args if isinstance(t, Tensor))
    copies = copies_beyond_cache(held, inputs.settings.device)
    others = [make(*(t.clone() for t in inputs.tensors)) for _ in range(copies - 1)]
    turns = itertools.cycle([*others, run])
    work = _work(inputs, lambda: next(turns)(), run, copies=copies, **details)
    return dataclasses.replace(work, read_bytes=held)


def _ours(inputs: Inputs) -> Work:
    objection = triton_cpu.objection()
    if objection is None and os.environ.get("TRITON_INTERPRET") == "1":
        objection = "TRITON_INTERPRET=1 is set: nothing is compiled"
    if objection is not None:
        raise PeerMissingError(objection)
    return _in_turns(inputs, partial(inputs.op.ours, _kernels()))


def _torch(inputs: Inputs) -> Work:
    function = inputs.op.torch(*inputs.tensors).func.__name__
    return _in_turns(inputs, inputs.op.torch, function=function)


@functools.cache
def _interpreted_run(point: tuple[tuple[str, Any], ...], settings: Settings) -> partial[Tensor]:
    inputs = make_inputs(**dict(point), settings=settings)
    return inputs.op.ours(_kernels(), *inputs.tensors)


def _interpret(point: tuple[tuple[str, Any], ...], settings: Settings, wanted: bool) -> Any:
    """Run a kernel in the interpreter's process, on the same inputs, drawn there again."""
    torch.set_num_threads(settings.threads)
    output = _interpreted_run(point, settings)()
    return output.numpy() if wanted else None


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables for processes that start inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _interpreter(inputs: Inputs) -> Work:
    """Start a process of its own: TRITON_INTERPRET is read when a kernel is decorated."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    task = (tuple(inputs.point.items()), inputs.settings)
    threads = str(inputs.settings.threads)
    with _environment(TRITON_INTERPRET="1", OMP_NUM_THREADS=threads):
        first: np.ndarray = pool.submit(_interpret, *task, True).result()
    return _work(
        inputs,
        lambda: pool.submit(_interpret, *task, False).result(),
        lambda: torch.from_numpy(first),
    )


def _grid(shape: str, names: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Point]:
    return [
        {"op": name, "dtype": dtype, "cache": cache, **SIZES[shape][OPS[name].size]}
        for name in names
        for dtype in OPS[name].dtypes
        if dtype in dtypes
        for cache in OPS[name].caches
    ]


def case(*, shape: str = "full", interpreter: bool = False) -> Case:
    """Return the case.

    Args:
        shape: "full", or "tiny" to see that it runs.
        interpreter: compare with Triton's interpreter, on smaller sizes and under another name.

    Raises:
        ValueError: ``shape`` is unknown.
    """
    if shape not in ("full", "tiny"):
        raise ValueError(f"`shape`: expected one of full, tiny, got {shape!r}")
    largest = max(TOLERANCE.values())
    providers: Mapping[str, Provider] = {
        "triton_cpu": Provider("triton_cpu", _ours, largest),
        "torch": Provider(
            "torch", _torch, largest,
            note="scaled_dot_product_attention, F.linear, torch.mm, torch._int_mm, torch.softmax, "
            "torch.add",
        ),
    }  # fmt: skip
    grid = _grid(shape, tuple(OPS), tuple(DTYPES))
    if interpreter:
        grid = _grid("interpreter" if shape == "full" else shape, _INTERPRETED, ("fp32",))
        note = "TRITON_INTERPRET=1, in a process of its own"
        providers = {
            **providers, "interpreter": Provider("interpreter", _interpreter, largest, note=note)
        }  # fmt: skip
    return Case(
        name="triton_cpu_interpreter" if interpreter else "triton_cpu",
        title="Triton kernels on the CPU" + (", compiled and interpreted" if interpreter else ""),
        grid=grid,
        inputs=make_inputs,
        reference=lambda inputs: inputs.exact,
        providers=providers,
        baselines=("interpreter", "torch") if interpreter else ("torch",),
        flops=lambda op, dtype, cache, **sizes: OPS[op].flops(**sizes),
        panels=(("op",), ("dtype",)),
    )
