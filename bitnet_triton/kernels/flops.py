"""What the linears cost, for ``torch.utils.flop_counter``: two operations a weight and row.

Operations count as in ``F.linear``, whatever their type; quantisers count nothing, as there. Tokens
without a label count as if they had one: shapes do not tell.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from bitnet_triton.kernels.packing import CODES_PER_BYTE


def _bit_linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


def _dweight(dy: torch.Size, a: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * dy[0] * dy[1] * a[1]


def _ternary_linear(x: torch.Size, packed: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * CODES_PER_BYTE * packed[0] * packed[1]


def _entropy(
    hidden: torch.Size, weight: torch.Size, labels: torch.Size, ignore: int, chunk: int,
    with_gradient: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return (2 if with_gradient else 1) * _bit_linear(hidden, weight)


def _entropy_bwd(
    dlosses: torch.Size, hidden: torch.Size, weight: torch.Size, labels: torch.Size,
    stats: torch.Size, ignore: int, chunk: int, with_dhidden: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return (3 if with_dhidden else 2) * _bit_linear(hidden, weight)


@functools.cache
def register_flop_formulas() -> None:
    """Tell ``torch.utils.flop_counter`` what the linears cost; a second call does nothing.

    Not done on import, because that module imports Triton. Layers do it when they are built; a
    counter that is made before the first of them, or beside bare functions, needs this call.
    """
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.bitnet_triton
    for op, formula in (
        (ops.bit_linear_fwd, _bit_linear),
        (ops.bit_linear_bwd_dx, _bit_linear),
        (ops.bit_linear_bwd_dweight, _dweight),
        (ops.ternary_linear_fwd, _ternary_linear),
        (ops.ternary_linear_bwd, _ternary_linear),
        (ops.linear_cross_entropy_fwd, _entropy),
        (ops.linear_cross_entropy_bwd, _entropy_bwd),
    ):
        register_flop_formula(op)(formula)
