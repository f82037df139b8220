"""One file a workload: inputs, providers, operations and bytes."""

from types import ModuleType
from typing import Any

from bench.case import Case
from bench.cases import (
    bit_linear,
    bucket_steps,
    code_steps,
    flash_attention,
    generate,
    int8_linear,
    linear_attention,
    many_requests,
    model,
    page_steps,
    policy_steps,
    sampling,
    small_batches,
    sparse_attention,
    state_steps,
    ternary_linear,
    triton_cpu,
)

CASES: dict[str, ModuleType] = {
    "ternary_linear": ternary_linear,
    "small_batches": small_batches,
    "bit_linear": bit_linear,
    "flash_attention": flash_attention,
    "sparse_attention": sparse_attention,
    "sampling": sampling,
    "bucket_steps": bucket_steps,
    "page_steps": page_steps,
    "code_steps": code_steps,
    "policy_steps": policy_steps,
    "linear_attention": linear_attention,
    "state_steps": state_steps,
    "int8_linear": int8_linear,
    "model": model,
    "generate": generate,
    "many_requests": many_requests,
    "triton_cpu": triton_cpu,
}


def make_case(name: str, **options: Any) -> Case:
    """Build a case by name; ``model`` and ``triton_cpu`` take options."""
    return CASES[name].case(**options)


__all__ = ["CASES", "make_case"]
