"""Launch kernels on CPU tensors beside whatever driver is active, a GPU's or none."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import triton
from triton.backends import Backend, backends
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, KernelInterface

from bitnet_triton.triton_cpu import compat
from bitnet_triton.triton_cpu.compiler import BACKEND, TARGET, CPUBackend
from bitnet_triton.triton_cpu.driver import CPUDriver, benchmark
from bitnet_triton.triton_cpu.entry import Entry
from bitnet_triton.triton_cpu.launcher import Launcher

_ATTRIBUTE = "_triton_cpu"


def register() -> None:
    """Let ``triton.compile`` find the backend; Triton still does not choose it by itself."""
    backends.setdefault(BACKEND, Backend(compiler=CPUBackend, driver=CPUDriver))


def prepared(kernel: Any) -> Any:
    """Return the counterpart of ``kernel`` that runs on the CPU; the kernel keeps it.

    Args:
        kernel: from ``triton.jit``, perhaps under ``triton.heuristics`` and ``triton.autotune``.
    """
    known = getattr(kernel, _ATTRIBUTE, None)
    if known is not None and known[0] is kernel:  # a copy of a kernel has a copy of the attribute
        return known[1]
    counterpart = _counterpart(kernel)
    setattr(kernel, _ATTRIBUTE, (kernel, counterpart))
    return counterpart


def _counterpart(kernel: Any) -> Any:
    if isinstance(kernel, JITFunction):
        return SideKernel(kernel)
    inner = getattr(kernel, "fn", None)
    if not isinstance(kernel, KernelInterface) or not isinstance(inner, KernelInterface):
        return kernel  # interpreted kernels run on the CPU as they are
    shadow = copy.copy(kernel)
    shadow.__dict__.pop(_ATTRIBUTE, None)
    shadow.fn = prepared(inner)
    if isinstance(kernel, Autotuner):
        _tune_on_cpu(shadow)
    return shadow


def _tune_on_cpu(tuner: Any) -> None:
    """Give a copied tuner its own results, timed on the CPU."""
    tuner.cache = {}
    # keyed by the active driver's target, which is not ours
    tuner.cache_results = False
    chosen_by_user = tuner._do_bench is not None and tuner.num_warmups is None
    if not chosen_by_user or tuner.num_reps is not None or tuner.use_cuda_graph:
        tuner._do_bench = benchmark
    tuner.__dict__.pop("do_bench", None)


class SideKernel(KernelInterface):
    """A jitted function that runs on the CPU, with the interface that wrappers expect of one."""

    def __init__(self, fn: JITFunction) -> None:
        register()
        self.fn = fn
        self.arg_names = fn.arg_names
        self.__name__ = fn.__name__
        self._constants = fn.constexprs
        self._backend = CPUBackend(TARGET)
        self._bind = compat.make_binder(fn, self._backend)
        self._compiled: dict[tuple, tuple[Launcher, Entry, Any]] = {}
        self._lock = threading.Lock()
        self._knobs = compat.runtime_knobs()

    def run(self, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        """Compile the kernel where needed and, unless ``warmup``, run it over ``grid``."""
        fn = self.fn
        for hook in fn.pre_run_hooks:
            hook(*args, **kwargs)
        try:
            bound, special, rest = self._bind(*args, **kwargs)
        except TypeError:
            self._explain(args, kwargs)
            raise
        values = tuple(bound.values())
        debug = rest.pop("debug", fn.debug) or self._knobs.debug
        # the types keep constants like 1, 1.0 and True apart
        kinds = [type(values[i]) for i in self._constants]
        key = (*special, *kinds, *rest.items(), debug)
        found = self._compiled.get(key)
        if found is None:
            found = self._compile(key, bound, special, rest, kwargs, debug)
        if fn.used_global_vals:
            self._check_globals()
        launcher, entry, kernel = found
        if not warmup:
            launcher.start(entry, *_three(grid(bound) if callable(grid) else grid), values)
        return kernel

    def _compile(
        self, key: tuple, bound: dict, special: list, rest: dict, kwargs: dict, debug: bool
    ) -> tuple[Launcher, Entry, Any]:
        with self._lock:
            if key in self._compiled:
                return self._compiled[key]
            kwargs = {**compat.implied_options(), **kwargs, "debug": debug}
            options, signature, constants, attributes = compat.pack_arguments(
                self.fn, self._backend, kwargs, bound, special, rest
            )
            source = ASTSource(self.fn, signature, constants, attributes)
            kernel = triton.compile(source, target=TARGET, options=options.__dict__)
            launcher = Launcher(source, kernel.metadata)
            self._compiled[key] = launcher, Entry(kernel.asm["so"]), kernel
            return self._compiled[key]

    def _check_globals(self) -> None:
        """Refuse to run where a global that was compiled into the kernel has changed."""
        for (name, _), (value, scope) in self.fn.used_global_vals.items():
            if scope.get(name, self) != value:
                raise RuntimeError(
                    f"global variable {name} has changed since the kernel {self.__name__} was "
                    f"compiled, from {value} to {scope.get(name)}"
                )

    def _explain(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Raise a TypeError that names the kernel where the arguments do not fit its signature."""
        names = {k: v for k, v in kwargs.items() if k in self.arg_names}
        try:
            self.fn.signature.bind(*args, **names)
        except TypeError as error:
            raise TypeError(f"kernel {self.__name__}: {error}") from None

    def __repr__(self) -> str:
        return f"SideKernel({self.fn!r})"


def _three(grid: Sequence[int]) -> tuple[int, int, int]:
    """Fill a grid of one to three sizes up with ones."""
    rank = len(grid)
    if not 1 <= rank <= 3:
        raise ValueError(f"`grid`: expected one to three sizes, got {grid!r}")
    return grid[0], grid[1] if rank > 1 else 1, grid[2] if rank > 2 else 1
