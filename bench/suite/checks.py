"""Checks of one op: fresh random inputs, a float64 reference, and a failure with a name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bench.suite.plan import Item, Plan, Result
from bitnet_triton import use_backend
from bitnet_triton.testing import assert_close

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Checks:
    """Collects the checks of a section.

    Args:
        plan: device and sizes.
    """

    def __init__(self, plan: Plan) -> None:
        self.device, self.small = plan.device, plan.small
        self.items: list[Item] = []

    def add(
        self,
        op: str,
        what: str,
        check: Callable[[], None],
        *,
        essential: bool = True,
        backend: str | None = "triton",
        poisoned: bool = True,
    ) -> None:
        """Add a check.

        Args:
            op: the function that is checked.
            what: the inputs, for the name.
            check: raises if a result is wrong.
            essential: stays in a quick run.
            backend: is forced: a kernel that cannot run is a failure, not a reference in its place.
                None where the op has no kernel for this device.
            poisoned: uninitialised memory is NaN, so that an element that nobody writes shows. A
                kernel writes that in front of each of ours.
        """
        name = f"{op} {what}"

        def run() -> list[Result]:
            start = time.monotonic()
            _check(check, backend, poisoned)
            took = time.monotonic() - start
            return [{"name": name, "op": op, "status": "passed", "reason": "", "seconds": took}]

        self.items.append(Item(name, run, essential))

    def essential_first(self) -> list[Item]:
        """Return all checks: if time runs out, it is the variants that are left out."""
        return sorted(self.items, key=lambda item: not item.essential)


def _check(check: Callable[[], None], backend: str | None, poisoned: bool) -> None:
    settings = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = poisoned
    try:
        if backend is None:
            check()
        else:
            with use_backend(backend):
                check()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]


def assert_all_close(
    ours: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    eager: Mapping[str, Tensor] | None = None,
    gradients_are_sums: bool = False,
    **limits: float,
) -> None:
    """Compare results by name; ``eager`` counts where it has the dtype of ours.

    With ``gradients_are_sums``, over rows, heads and tiles in another order than the reference's,
    the worst element of a float32 gradient may be off by four times the reference's worst error
    instead of twice: the limit of the attention's own tests, and for the same reason.

    Raises:
        AssertionError: a result is missing or wrong.
    """
    if ours.keys() != exact.keys():
        raise AssertionError(f"expected {', '.join(exact)}, got {', '.join(ours)}")
    for name, value in exact.items():
        rounded = None if eager is None else eager[name]
        if rounded is not None and rounded.dtype != ours[name].dtype:
            rounded = None
        own = dict(limits)
        if gradients_are_sums and name.startswith("d"):
            own |= _limit_of_sums(rounded, value)
        assert_close(name, ours[name], value, eager=rounded, **own)


def _limit_of_sums(eager: Tensor | None, exact: Tensor) -> dict[str, float]:
    if eager is None or eager.dtype != torch.float32:
        return {}
    step = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    return {"worst": 4 * torch.maximum((eager - exact).abs().max(), step).item()}


def assert_codes_close(codes: Tensor, exact: Tensor, most: float = 0.01) -> None:
    """Compare codes with those of float64: beside a tie the last bit of float32 decides.

    Raises:
        AssertionError: a code is off by two, or more than the share ``most`` by one.
    """
    off = (codes.double() - exact).abs()
    if off.max() > 1:
        raise AssertionError(f"a code is off by {off.max().item():g}")
    if (share := off.ne(0).double().mean().item()) > most:
        raise AssertionError(f"{share:.2%} of the codes are off by one")


def assert_same(name: str, actual: Tensor, expected: Tensor) -> None:
    """Compare integers, or values that are only moved.

    Raises:
        AssertionError: they differ.
    """
    if not torch.equal(actual, expected):
        wrong = "shapes" if actual.shape != expected.shape else int((actual != expected).sum())
        raise AssertionError(f"{name}: {wrong} of {expected.numel()} elements differ")


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor
) -> dict[str, Tensor]:
    """Return the output y, and the gradient of each input as d0, d1, ..."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    given = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(y, given, dy.to(y.dtype))
    names = [f"d{i}" for i, t in enumerate(leaves) if t is not None]
    return {"y": y.detach(), **dict(zip(names, grads))}


def to(dtype: torch.dtype, tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return the tensors in ``dtype``; None stays."""
    return [None if t is None else t.to(dtype) for t in tensors]
