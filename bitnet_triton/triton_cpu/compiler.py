"""The compiler half of the backend: Triton IR, then C++, then a shared library."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from triton._C.libtriton import ir, passes
from triton.backends.compiler import BaseBackend, GPUTarget

from bitnet_triton.triton_cpu import cache, compat
from bitnet_triton.triton_cpu.build import build, sources_identity
from bitnet_triton.triton_cpu.toolchain import toolchain

# Not "cpu": torch takes a backend of that name for the triton-cpu project
BACKEND = "tcpu"
TARGET = GPUTarget(BACKEND, platform.machine(), 1)
# Bytes that a program may keep its blocks in, as Triton is told
LARGEST_MEMORY = 1 << 30
_CACHE_LINE = 64


@dataclass(frozen=True)
class CPUOptions:
    """Options of one compilation. Those that only speak to GPUs are accepted and ignored."""

    materialise: bool = False
    assume_disjoint: bool = True

    debug: bool = False
    sanitize_overflow: bool = True
    backend_name: str = BACKEND
    arch: str = ""
    extern_libs: Any = None
    ir_override: str | None = None
    instrumentation_mode: str = ""
    fpsan_homomorphic_casts: bool = False
    enable_fp_fusion: bool = True
    supported_fp8_dtypes: tuple[str, ...] = (
        "fp8e4nv", "fp8e5", "fp8e4b15", "fp8e4b8", "fp8e5b16",
    )  # fmt: skip
    deprecated_fp8_dot_operand_dtypes: tuple[str, ...] = ()
    default_dot_input_precision: str = "ieee"
    allowed_dot_input_precisions: tuple[str, ...] = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
    max_num_imprecise_acc_default: int = 0

    num_warps: int = 1
    num_ctas: int = 1
    num_stages: int = 1
    warp_size: int = 1
    cluster_dims: tuple[int, ...] = (1, 1, 1)
    launch_cooperative_grid: bool = False
    launch_cluster: bool = False
    launch_pdl: bool = False
    maxnreg: int | None = None
    ptx_version: int | None = None
    ptx_options: str | None = None
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    kpack: int = 1

    def hash(self) -> str:
        """Identify these options in Triton's cache."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


# What decides about the result; the rest keeps its default, so that configurations that differ
# in the number of warps share one kernel
_MEANINGFUL = frozenset(
    {
        "materialise", "assume_disjoint", "debug", "sanitize_overflow", "extern_libs",
        "ir_override", "instrumentation_mode", "fpsan_homomorphic_casts", "enable_fp_fusion",
        "default_dot_input_precision", "max_num_imprecise_acc_default",
    }
)  # fmt: skip


class CPUBackend(BaseBackend):
    """Compiles kernels for the CPU of this machine."""

    binary_ext = "so"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        """Tell whether this backend compiles for ``target``."""
        return target.backend == BACKEND

    def hash(self) -> str:
        """Identify everything but kernel and options that decides about the result.

        Triton looks into its cache with it, and loads what it finds: hence the check of the
        directory here.
        """
        directory = Path(compat.cache_directory())
        if directory.exists():
            cache.refuse_foreign(directory)
        return f"{BACKEND}-{sources_identity()}-{toolchain().identity}"

    def parse_options(self, options: dict[str, Any]) -> CPUOptions:
        """Choose the options of a compilation from the keywords of a launch."""
        given = {k: v for k, v in options.items() if k in _MEANINGFUL and v is not None}
        if os.environ.get("TRITON_CPU_MATERIALISE") == "1":
            given["materialise"] = True
        return CPUOptions(**given)

    def pack_metadata(self, metadata: Any) -> tuple:
        """Return what a launcher gets to see of the metadata: nothing."""
        return ()

    def get_codegen_implementation(self, options: CPUOptions) -> dict[str, Any]:
        """Return the functions with which Triton's front end asks a backend."""
        return {"min_dot_size": _smallest_dot, "convert_custom_types": None}

    def get_module_map(self) -> dict[str, ModuleType]:
        """Return what kernels get when they import ``triton.language.extra.libdevice``."""
        from triton.language.extra.cuda import libdevice

        return {"triton.language.extra.libdevice": libdevice}

    def load_dialects(self, ctx: Any) -> None:
        """Load no dialects beyond Triton's own."""

    def add_stages(self, stages: dict[str, Any], options: CPUOptions, language: Any = None) -> None:
        """Enter the steps from the front end's module to the binary."""
        stages["ttir"] = _make_ttir
        stages["cpp"] = functools.partial(_make_cpp, options=options)
        stages["so"] = functools.partial(_make_so, options=options)


def _smallest_dot(_left: Any, _right: Any) -> tuple[int, int, int]:
    return (1, 1, 1)


def _make_ttir(module: Any, metadata: dict[str, Any]) -> Any:
    _keep_native_functions(module)
    simplify(module)
    return module


def simplify(module: Any) -> None:
    """Inline all functions, lower descriptors and block pointers to pointers, simplify."""
    manager = ir.pass_manager(module.context)
    passes.common.add_inliner(manager)
    if hasattr(passes.ttir, "add_rewrite_tensor_pointer"):  # Triton had block pointers up to 3.8
        passes.ttir.add_rewrite_tensor_pointer(manager)
    passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.common.add_cse(manager)
    passes.ttir.add_triton_licm(manager)
    passes.common.add_symbol_dce(manager)
    passes.ttir.add_loop_unroll(manager)
    passes.common.add_cse(manager)
    compat.run_passes(manager, module, "make_ttir")


def _keep_native_functions(module: Any) -> None:
    """Keep library functions that have a lowering of their own out of the inliner's reach."""
    from bitnet_triton.triton_cpu import native

    native.mark(module)


def _make_cpp(module: Any, metadata: dict[str, Any], options: CPUOptions) -> str:
    from bitnet_triton.triton_cpu.emit import emit_kernel

    text = compat.generic_text(module)
    emitted = emit_kernel(
        text, materialise=options.materialise, assume_disjoint=options.assume_disjoint
    )
    metadata["name"] = emitted.name
    # Triton refuses a kernel that takes more than the device has; host code divides by it
    metadata["shared"] = min(max(emitted.memory, _CACHE_LINE), LARGEST_MEMORY)
    metadata["disjoint"] = [list(pair) for pair in emitted.disjoint]
    metadata["arguments"] = compat.argument_types(text)
    return emitted.source


def _make_so(source: str, metadata: dict[str, Any], options: CPUOptions) -> bytes:
    flags = () if options.enable_fp_fusion else ("-ffp-contract=off",)
    return build(source, metadata["name"], *flags)


def options_of(metadata: Any) -> dict[str, Any]:
    """Return the options that a compiled kernel was made with."""
    return {
        field.name: getattr(metadata, field.name)
        for field in fields(CPUOptions)
        if field.name in _MEANINGFUL and hasattr(metadata, field.name)
    }
