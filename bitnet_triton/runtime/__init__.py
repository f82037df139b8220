"""WHERE an op runs: devices, choice of backend, op registration, kernel launch."""

from bitnet_triton.runtime.launch import launch
from bitnet_triton.runtime.library import register_op
from bitnet_triton.runtime.select import (
    BACKENDS,
    Implementation,
    backend_objection,
    forced_backend,
    select,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "Implementation",
    "backend_objection",
    "forced_backend",
    "launch",
    "register_op",
    "select",
    "use_backend",
]
