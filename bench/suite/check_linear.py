"""Checks of the linears: packed ternary, trainable, eight bits, dense."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bench.suite.checks import DTYPES, Checks, assert_same, gradients, to
from bench.suite.plan import Item, Plan
from bitnet_triton.kernels import (
    Int8Weight,
    MergedTernaryWeight,
    TernaryWeight,
    bit_linear,
    dense_linear,
    dense_linear_topk,
    int8_linear,
    int8_linear_topk,
    quantize_activations,
    ternary_linear,
    ternary_linear_quantized,
)
from bitnet_triton.kernels.bit_linear.reference import bit_linear_reference
from bitnet_triton.kernels.dense_linear.reference import dense_linear_reference
from bitnet_triton.kernels.int8_linear.reference import split_activations_reference
from bitnet_triton.kernels.ternary_linear.reference import ternary_linear_reference
from bitnet_triton.testing import RMS_LIMITS, assert_close

Shape = tuple[int, int, int]  # M, N, K


def _own_quantisation(M: int, K: int, device: torch.device) -> Tensor:
    """Return float64 rows that the quantiser maps to themselves: quantisers jump beside a tie."""
    codes = torch.randint(-126, 127, (M, K), device=device).double()
    codes.scatter_(1, torch.randint(K, (M, 1), device=device), 127.0)
    return codes / 32


def _codes(N: int, K: int, device: torch.device) -> Tensor:
    return torch.randint(-1, 2, (N, K), dtype=torch.int8, device=device)


def _masters(N: int, K: int, levels: str, device: torch.device) -> Tensor:
    """Return float64 master weights away from every threshold of their quantiser."""
    signs = _codes(N, K, device).double()
    if levels == "binary":  # as many of each: their mean stays between them
        signs = torch.arange(N * K, device=device).remainder(2).mul(2).sub(1).double()
        signs = signs[torch.randperm(N * K, device=device)].view(N, K)
    return 0.05 * (signs + 0.3 * (torch.rand_like(signs) - 0.5))


def _randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return float64 values that ``dtype`` holds."""
    return torch.randn(shape, device=device).to(dtype).double()


def _check_ternary(shape: Shape, dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    M, N, K = shape
    weight = TernaryWeight.from_codes(_codes(N, K, device), 0.0371)
    inputs = [
        _own_quantisation(M, K, device),
        _randn(N, dtype=dtype, device=device) if bias else None,
    ]
    dy = _randn(M, N, dtype=dtype, device=device)
    codes, scale = weight.codes(), weight.scale.double()

    def reference(x: Tensor, bias: Tensor | None) -> Tensor:
        return ternary_linear_reference(x, codes.to(x), scale.to(x), bias)

    narrow = to(dtype, inputs)
    ours = gradients(lambda x, bias: ternary_linear(x, weight, bias), narrow, dy.to(dtype))
    eager = gradients(reference, narrow, dy.to(dtype))
    for name, value in gradients(reference, inputs, dy).items():
        limits = _limits_of_sums(name, eager[name], value, {"d0": N, "d1": M})
        assert_close(name, ours[name], value, eager=eager[name], **limits)


def _limits_of_sums(
    name: str, eager: Tensor, exact: Tensor, terms: Mapping[str, int]
) -> dict[str, float]:
    """Return limits of a float32 gradient that adds ``terms[name]`` products one by one.

    Each addition rounds a partial sum by at most eps / 2 of it, and no partial sum is expected to
    be larger than the largest result. Independent roundings add up like sqrt(terms): eps / 2 times
    that is the limit of the RMS error, and twice as much, of the largest result, that of the worst
    element. cuBLAS adds in parts, so that its own error says little about other orders: it counts,
    as in ``assert_close``, where the terms are few.
    """
    if eager.dtype != torch.float32 or name not in terms:
        return {}
    step = torch.finfo(torch.float32).eps * max(8.0, math.sqrt(terms[name]))
    worst = max(step * exact.abs().max().item(), 3 * (eager - exact).abs().max().item())
    return {"rms": max(RMS_LIMITS[torch.float32], step / 2), "worst": worst}


def _check_quantized(
    M: int, K: int, parts: Sequence[int], dtype: torch.dtype, residual: bool, device: torch.device
) -> None:
    codes, scale = quantize_activations(torch.randn(M, K, device=device))
    weights = [
        TernaryWeight.from_codes(_codes(N, K, device), 0.01 * (i + 1)) for i, N in enumerate(parts)
    ]
    added = torch.randn(M, sum(parts), device=device).to(dtype) if residual else None
    y = ternary_linear_quantized(
        codes, scale, codes.sum(-1, dtype=torch.int32), MergedTernaryWeight.merge(weights), added,
        dtype=dtype,
    )  # fmt: skip
    products = [(codes.double() @ w.codes().double().t()) * w.scale.double() for w in weights]
    exact = torch.cat(products, -1) * scale.double()
    eager = exact.to(dtype)
    if added is not None:  # rounded before it is added, as a sum of two tensors is
        exact, eager = exact + added.double(), eager + added
    assert_close("y", y, exact, eager=eager)


def _check_trained(
    shape: Shape, levels: str, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    (M, N, K), (dtype, weight_dtype) = shape, dtypes
    inputs = [
        _own_quantisation(M, K, device),
        _masters(N, K, levels, device).to(weight_dtype).double(),
        _randn(N, dtype=weight_dtype, device=device),
    ]
    dy = _randn(M, N, dtype=dtype, device=device)
    op = functools.partial(bit_linear, levels=levels)
    reference = functools.partial(bit_linear_reference, levels=levels)
    narrow = [inputs[0].to(dtype), *to(weight_dtype, inputs[1:])]
    ours = gradients(op, narrow, dy.to(dtype))
    exact = gradients(reference, inputs, dy)
    eager = gradients(reference, to(dtype, inputs), dy.to(dtype))
    for name, value in exact.items():
        if ours[name].dtype == dtype:
            limits = _limits_of_sums(name, eager[name], value, {"d0": N, "d1": M, "d2": M})
            assert_close(name, ours[name], value, eager=eager[name], **limits)
        else:  # a float32 sum of products of narrow operands is no better than they are
            worst = 2 * (eager[name].double() - value).abs().max().item()
            assert_close(name, ours[name], value, rms=8e-3, worst=worst)


def _check_int8(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    M, N, K = shape
    x = torch.randn(M, K, device=device).to(dtype)
    bias = torch.randn(N, device=device).to(dtype)
    weight = Int8Weight.from_dense(torch.randn(N, K, device=device))
    # split in float32, as the op does: beside a tie float64 rounds another way
    high, low, step = (t.double() for t in split_activations_reference(x.float()))
    exact = (128 * high + low) * step[:, None] @ weight.dequantize(torch.float64).t()
    assert_close("y", int8_linear(x, weight, bias), exact + bias.double())
    _check_best(int8_linear_topk(x, weight, 5, bias), int8_linear(x, weight, bias))


def _check_dense(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    M, N, K = shape
    x, weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (N, K), (N,)))
    y = dense_linear(x, weight, bias)
    wide = [t.double() for t in (x, weight, bias)]
    eager = dense_linear_reference(x, weight, bias)
    assert_close("y", y, dense_linear_reference(*wide), eager=eager)
    _check_best(dense_linear_topk(x, weight, 5, bias), y)


def _check_best(best: tuple[Tensor, Tensor], y: Tensor) -> None:
    """Compare the largest outputs with those among all of them, and their places with them."""
    values, indices = best
    assert_same("values", values, y.topk(values.shape[1]).values)
    assert_same("indices", y.gather(1, indices), values)


def _add_packed(checks: Checks, shapes: Sequence[Shape]) -> None:
    for i, (M, N, K) in enumerate(shapes):
        for name, dtype in DTYPES.items():
            bias = i % 2 == 1
            run = functools.partial(_check_ternary, (M, N, K), dtype, bias, checks.device)
            what = f"{M}x{K} -> {N}{' bias' if bias else ''} {name} forward and backward"
            checks.add("ternary_linear", what, run, essential=name == "bf16")


def _add_merged(checks: Checks) -> None:
    few, K = ((72, 20, 4), 96) if checks.small else ((2560, 640, 640), 2560)
    for rows in (1, 5, 40) if checks.small else (1, 16, 513):
        for count in (1, 2, 3):
            for name, dtype in DTYPES.items():
                residual = count != 2
                run = functools.partial(
                    _check_quantized, rows, K, few[:count], dtype, residual, checks.device
                )
                what = f"{rows} rows, parts {few[:count]}{' residual' if residual else ''} {name}"
                essential = name == "bf16" and count != 2
                checks.add("ternary_linear_quantized", what, run, essential=essential)


def items(plan: Plan) -> Sequence[Item]:
    """Return the checks: one row, few rows, many rows, sizes that are no multiple of a tile."""
    checks = Checks(plan)
    if plan.small:
        packed = [(1, 72, 33), (5, 20, 64), (40, 136, 131)]
        trained, heads = [(33, 20, 65)], [(1, 130, 100), (5, 130, 100)]
    else:
        packed = [(1, 6912, 2560), (5, 2560, 6912), (16, 3840, 2560), (513, 640, 2560)]
        packed += [(1, 72, 33), (70, 136, 131)]
        trained = [(512, 2560, 2560), (257, 129, 65)]
        heads = [(1, 32064, 2560), (7, 1030, 515), (40, 2048, 2560)]
    _add_packed(checks, packed)
    _add_merged(checks)
    mixes = {**{name: (d, d) for name, d in DTYPES.items()}}
    mixes["bf16 with fp32 masters"] = (torch.bfloat16, torch.float32)
    for i, shape in enumerate(trained):
        for name, dtypes in mixes.items():
            for levels in ("ternary", "binary"):
                run = functools.partial(_check_trained, shape, levels, dtypes, plan.device)
                what = f"{shape[0]}x{shape[2]} -> {shape[1]} {levels} {name} forward and backward"
                checks.add("bit_linear", what, run, essential=i == 0 and name == "bf16")
    for i, shape in enumerate(heads):
        for name, dtype in DTYPES.items():
            what = f"{shape[0]}x{shape[2]} -> {shape[1]} {name}, and its best 5"
            first = i == 0 and name == "bf16"
            run = functools.partial(_check_int8, shape, dtype, plan.device)
            checks.add("int8_linear", what, run, essential=first)
            # its kernel is for a few rows on a CPU, elsewhere PyTorch's product is the op
            run = functools.partial(_check_dense, shape, dtype, plan.device)
            checks.add("dense_linear", what, run, essential=first, backend=None)
    return checks.essential_first()
