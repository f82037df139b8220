"""WHERE an op runs: devices, choice of backend, op registration, kernel launch."""

from bitnet_triton.runtime.launch import capture, cdiv, launch
from bitnet_triton.runtime.library import register_op
from bitnet_triton.runtime.select import (
    BACKENDS,
    Implementation,
    backend_objection,
    explain,
    forced_backend,
    remember_backend,
    remembered_backend,
    select,
    use_backend,
)
from bitnet_triton.runtime.specialize import compile_by_kind

__all__ = [
    "BACKENDS",
    "Implementation",
    "backend_objection",
    "capture",
    "cdiv",
    "compile_by_kind",
    "explain",
    "forced_backend",
    "launch",
    "register_op",
    "remember_backend",
    "remembered_backend",
    "select",
    "use_backend",
]
