"""Compare a kernel with its float64 reference, and make inputs: for our tests and other people's.

``assert_close`` asks for two things, because each alone lets real bugs through. The relative RMS
error of the whole tensor misses single wrong elements; the worst element misses small systematic
errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative RMS error of a result in this dtype; about three times what a careful kernel makes
RMS_LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_close(
    name: str,
    actual: Tensor,
    exact: Tensor,
    *,
    eager: Tensor | None = None,
    rms: float | None = None,
    worst: float | None = None,
) -> None:
    """Raise ``AssertionError`` unless ``actual`` is as good as its dtype allows.

    Args:
        name: of the tensor, for the message.
        actual: float32, float16 or bfloat16: the result under test.
        exact: float64, the same shape: the reference on the same inputs, in float64.
        eager: the reference in the dtype of ``actual``, same shape. The worst element of
            ``actual`` may be off by three times the worst error of ``eager`` (two rounding steps
            of the largest element at least), plus one rounding step.
            None: the exact result rounded to the dtype of ``actual``.
        rms: limit of the relative RMS error, instead of the one by dtype; say why at the call.
        worst: limit of the worst absolute error, instead of the one from ``eager``; say why.
    """
    __tracebackhide__ = True
    if actual.dtype not in RMS_LIMITS or exact.dtype != torch.float64:
        raise AssertionError(
            f"{name}: expected a float32, float16 or bfloat16 result and a float64 reference, "
            f"got {actual.dtype} and {exact.dtype}"
        )
    eager = exact.to(actual.dtype) if eager is None else eager
    for what, tensor in (("the result", actual), ("its dtype's reference", eager)):
        if tensor.shape != exact.shape:
            raise AssertionError(
                f"{name}: expected {what} to be {list(exact.shape)}, got {list(tensor.shape)}"
            )
        if tensor.dtype != actual.dtype:
            raise AssertionError(f"{name}: expected {what} in {actual.dtype}, got {tensor.dtype}")
    actual, exact, eager = (t.detach().cpu() for t in (actual, exact, eager))
    for what, tensor in (("exact", exact), ("eager", eager), ("result", actual)):
        if not (finite := torch.isfinite(tensor)).all():
            index = _index(~finite)
            raise AssertionError(f"{name}: {what}{index} is {tensor[tuple(index)].item()}")
    if exact.numel() == 0:
        return

    error = (actual.double() - exact).abs()
    _check_worst(name, actual, exact, error, _worst_limit(exact, eager, worst))
    relative = (error.square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(1e-30)).item()
    limit = RMS_LIMITS[actual.dtype] if rms is None else rms
    if relative > limit:
        raise AssertionError(
            f"{name}: relative RMS error {relative:.3g} over the whole tensor, limit {limit:.3g}; "
            f"the worst element is {_index(error)}"
        )


def _worst_limit(exact: Tensor, eager: Tensor, worst: float | None) -> Tensor:
    """Return the largest error of each element."""
    if worst is not None:
        return torch.full_like(exact, worst)
    # one rounding step: the distance between two neighbours in the dtype, at that element
    info = torch.finfo(eager.dtype)
    step = (exact.abs() * info.eps).clamp_min(info.smallest_normal * info.eps)
    # with few elements the reference can be lucky in all of them: it is allowed two steps at least
    reference = torch.maximum((eager.double() - exact).abs().max(), 2 * step.max())
    # sums in another order: beyond twice that error came one run of the suite in some ten
    return 3 * reference + step


def _check_worst(name: str, actual: Tensor, exact: Tensor, error: Tensor, limit: Tensor) -> None:
    __tracebackhide__ = True
    excess = error - limit
    if excess.max() <= 0:
        return
    index = tuple(_index(excess))
    raise AssertionError(
        f"{name}: element {list(index)} is {actual[index].item():.8g}, exact "
        f"{exact[index].item():.8g}: off by {error[index].item():.3g}, limit "
        f"{limit[index].item():.3g}; {int((excess > 0).sum())} of {error.numel()} elements are off"
    )


def _index(values: Tensor) -> list[int]:
    """Return the index of the largest value."""
    flat = values.to(torch.float64).argmax()
    return [int(i) for i in torch.unravel_index(flat, values.shape)]


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Return normal values [*shape], drawn in float32 and rounded: the same on every device."""
    return torch.randn(shape).to(dtype).to(device)


def random_codes(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Return int8 codes [*shape], -1, 0 and 1 with equal probability."""
    return torch.randint(-1, 2, shape, dtype=torch.int8).to(device)
