"""The public verified sampling: pages that matter, and enough of a sample of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.kernels.common.checks import check_device, check_dtype, check_shape, check_tensor
from bitnet_triton.kernels.common.lengths import in_a_row
from bitnet_triton.kernels.common.linear import FLOATS
from bitnet_triton.kernels.lsh_sampling.signs import SignCodes, check_signs, sign_pages
from bitnet_triton.kernels.lsh_sampling.verified_reference import (
    verified_reference,
    verified_rows_reference,
)
from bitnet_triton.kernels.top_blocks import Units, pool_keys
from bitnet_triton.kernels.top_blocks.op import top_blocks
from bitnet_triton.runtime import Implementation, register_op, select

TAILS = ("normal", "sampled")


@dataclass(frozen=True, eq=False)
class Verified:
    """Everything but q, k and v.

    Attributes:
        bounds: [B pages Hk 2 D], largest and smallest entries of the keys of each page, by which
            pages are chosen; None: they are.
        leftpad: int32 [B], the first row that is no padding; None: the first one.
        used: int32 [B], one past the last row; None: all.
        page: rows of a page.
        selected: pages that a group reads, those that it reads in any case included.
        initial: first pages that are read in any case.
        local: latest ones.
        base: rows that tell how far terms lie apart, and the fewest that are drawn.
        seed: of the draw.
        epsilon: error of the sum of exponentials, as a share of it.
        delta: how probably it may be larger.
        tails: one of ``TAILS``.
        scale: multiplies the scores.
        pages: int32 [B 1 Hk selected], those that somebody has chosen; None: by ``bounds``.
    """

    bounds: Tensor | None
    leftpad: Tensor | None
    used: Tensor | None
    page: int
    selected: int
    initial: int
    local: int
    base: int
    seed: int
    tails: str
    epsilon: float
    delta: float
    scale: float
    pages: Tensor | None = None

    @property
    def deviations(self) -> float:
        """z, the standard errors that a share ``delta`` of draws lies beyond."""
        return NormalDist().inv_cdf(1 - self.delta / 2)

    @classmethod
    def build(
        cls, tensors: list[Tensor | None], numbers: list[int], factors: list[float]
    ) -> Verified:
        """Put together what ``flatten`` took apart."""
        *counts, tails = numbers
        *lengths, pages = tensors
        return cls(*lengths, *counts, TAILS[tails], *factors, pages)  # type: ignore[arg-type, call-arg]

    def flatten(self) -> tuple:
        """Take it apart into the arguments of ``build``."""
        counts = [self.page, self.selected, self.initial, self.local, self.base, self.seed]
        numbers = [*counts, TAILS.index(self.tails)]
        tensors = [self.bounds, self.leftpad, self.used, self.pages]
        return tensors, numbers, [self.epsilon, self.delta, self.scale]


def units_of(page: int) -> Units:
    """Return how pages are summed up."""
    return Units("bounds", page, page)


def triton_verified(
    q: Tensor, k: Tensor, v: Tensor, call: Verified
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with q [B 1 H D] by launches alone: it can be recorded.

    Returns:
        out, lse, and how many rows were drawn, int32 [B Hk 1].
    """
    from bitnet_triton.kernels.lsh_sampling.draw import launch_draw
    from bitnet_triton.kernels.lsh_sampling.gather import (
        Parts,
        Rows,
        launch_gather,
        list_splits,
    )
    from bitnet_triton.kernels.top_blocks.forward import launch_top_blocks

    Hk, page = k.shape[2], call.page
    pages = call.pages
    if pages is None:
        assert call.bounds is not None
        pages = launch_top_blocks(
            q, call.bounds, units=units_of(page), block=page, selected=call.selected,
            initial=call.initial, local=call.local, sets=Hk, tokens=k.shape[1],
            leftpad=call.leftpad, used=call.used,
        )  # fmt: skip
    splits = list_splits(q.device, is_shared=True)
    parts = Parts.empty(q, 2 * splits, v.shape[-1])
    rows: Any = {"scale": call.scale, "leftpad": call.leftpad, "used": call.used, "exact": None}
    launch_gather(q, k, v, Rows(pages[:, 0], page=page), parts, part0=0, **rows)
    drawn, counts, weights = launch_draw(
        q, k, parts, pages, read=splits, page=page, base=call.base, deviations=call.deviations,
        epsilon=call.epsilon, seed=call.seed, scale=call.scale, tails=call.tails,
        leftpad=call.leftpad, used=call.used,
    )  # fmt: skip
    listed = Rows(drawn, counts, log_weights=weights)
    launch_gather(q, k, v, listed, parts, part0=splits, **rows)
    return *parts.merge(q), counts


def _triton(q: Tensor, k: Tensor, v: Tensor, call: Verified) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return triton_verified(q, k, v, call)


def _reference(q: Tensor, k: Tensor, v: Tensor, call: Verified) -> tuple[Tensor, Tensor, Tensor]:
    (B, _, H, _), (Tk, Hk) = q.shape, k.shape[1:3]
    pages = call.pages
    if pages is None:
        assert call.bounds is not None
        pages = top_blocks(
            q, call.bounds, block=call.page, selected=call.selected, units=units_of(call.page),
            initial=call.initial, local=call.local, sets=Hk, tokens=Tk, leftpad=call.leftpad,
            seqused=call.used,
        )  # fmt: skip
    out = q.new_zeros((B, 1, H, v.shape[-1]))
    lse = q.new_full((B, H, 1), float("-inf"), dtype=torch.float32)
    counts = torch.zeros((B, Hk, 1), dtype=torch.int32, device=q.device)
    for b in range(B):
        end = Tk if call.used is None else min(int(call.used[b]), Tk)
        first = 0 if call.leftpad is None else min(int(call.leftpad[b]), end)
        for head in range(Hk) if end > first else ():
            group = slice(head * H // Hk, (head + 1) * H // Hk)
            own = (q[b, 0, group], k[b, first:end, head], v[b, first:end, head])
            own_q, own_k, own_v = (t.float() for t in own)
            chosen, drawn, _ = verified_rows_reference(
                own_q, own_k, pages[b, 0, head], page=call.page, base=call.base,
                deviations=call.deviations, epsilon=call.epsilon, seed=call.seed, head=head,
                scale=call.scale, tails=call.tails,
            )  # fmt: skip
            found, sums = verified_reference(own_q, own_k, own_v, chosen, drawn, call.scale)
            out[b, 0, group], lse[b, group, 0] = found.to(q.dtype), sums
            counts[b, head] = len(drawn)
    return out, lse, counts


VERIFIED = {
    "triton": Implementation(_triton),
    "reference": Implementation(_reference),
}


def _launch(q: Tensor, k: Tensor, v: Tensor, call: Verified) -> tuple[Tensor, Tensor, Tensor]:
    return select("verified_sampling", VERIFIED, q.device)(q, k, v, call)


def _fake(q: Tensor, k: Tensor, v: Tensor, call: Verified) -> tuple[Tensor, Tensor, Tensor]:
    B, _, H, _ = q.shape
    return (
        q.new_empty((B, 1, H, v.shape[-1])),
        q.new_empty((B, H, 1), dtype=torch.float32),
        q.new_empty((B, k.shape[2], 1), dtype=torch.int32),
    )


attend_verified = register_op("verified_sampling", _launch, _fake, bundle=Verified)


def verified_sampling_attention(  # noqa: PLR0913 - what is read in any case, and how well the rest
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    epsilon: float = 0.05,
    delta: float = 0.05,
    page: int = 32,
    selected: int = 32,
    initial: int = 1,
    local: int = 3,
    base: int = 256,
    seed: int = 0,
    tails: str = "normal",
    scale: float | None = None,
    bounds: Tensor | None = None,
    signs: SignCodes | None = None,
    leftpad: Tensor | None = None,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the pages that matter, and to a uniform sample in place of all other rows.

    How many rows are drawn follows from their spread (arXiv:2510.05688): so many that the sum of
    exponentials is off by a share of more than ``epsilon`` with probability ``delta`` at most, by
    the central limit theorem and the spread of ``base`` rows that are drawn apart, its own
    uncertainty and terms that so few rows may miss added. The bound is that of the denominator
    alone. Each drawn row has the weight ``rest / drawn``; numerator and denominator are right in
    the mean. For decoding; not differentiable.

    Args:
        q: [B 1 H D] float16, bfloat16 or float32, rotated.
        k: [B T Hk D] in the dtype of ``q``.
        v: [B T Hk Dv].
        epsilon: error of the sum of exponentials, as a share of it.
        delta: how probably it may be larger.
        page: rows of a page, 1 or more.
        selected: pages that all heads of a group read, ``initial`` and ``local`` included; the
            others are those with the largest bounds of scores (``top_blocks``).
        initial: first pages that are read in any case.
        local: latest ones, the unfinished one included.
        base: rows that tell how far terms lie apart, and the fewest that are drawn; at least 2.
        seed: of the draw, 0 up to 2**31 - 1; equal seeds and lengths draw equal rows.
        tails: what ``base`` rows may have missed. "normal": scores go on as a normal law has it,
            up to the largest of so many. "sampled": nothing; fewer rows, and errors beyond
            ``epsilon`` more often than ``delta`` where few rows that no page tells of weigh most.
        scale: multiplies the scores. Default: ``D ** -0.5``.
        bounds: [B pages Hk 2 D], what ``pool_keys`` makes of ``k``. Default: they are made.
        signs: what ``SignCodes.build`` makes of ``k``: pages are those with the row whose code is
            most like those of the group, and there are no bounds.
        leftpad: int32 [B], the first row that is no padding.
        used: int32 [B], one past the last row that a query sees. Default: all.

    Returns:
        out [B 1 H Dv] in the dtype of ``q``, lse float32 [B H 1], an estimate of that of all rows,
        and how many rows each group has drawn, int32 [B Hk 1]; pages and the ``base`` rows, of
        which only keys are read, come on top.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes do not fit, a number is out of range, or something requires a gradient.
        BackendUnavailableError: the forced backend cannot run.
    """
    _check_tensors(q, k, v, leftpad, used)
    leftpad, used = in_a_row(leftpad), in_a_row(used)
    for name, share in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < share < 1:
            raise ValueError(f"`{name}`: expected more than 0 and less than 1, got {share}")
    counts = {
        "page": (page, 1), "initial": (initial, 0), "local": (local, 1), "base": (base, 2),
        "selected": (selected, initial + local), "seed": (seed, 0),
    }  # fmt: skip
    for name, (count, least) in counts.items():
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"`{name}`: expected an integer, got {type(count).__name__}")
        if count < least or count >= 2**31:
            raise ValueError(f"`{name}`: expected at least {least}, below 2**31, got {count}")

    def call(bounds: Tensor | None, pages: Tensor | None = None) -> Verified:
        return Verified(
            bounds, leftpad, used, page, selected, initial, local, base, seed, tails,
            epsilon, delta, q.shape[-1] ** -0.5 if scale is None else scale, pages,
        )  # fmt: skip

    if tails not in TAILS:
        raise ValueError(f"`tails`: expected one of {', '.join(TAILS)}, got {tails!r}")
    if signs is not None:
        if bounds is not None:
            raise ValueError("`signs`: pages are chosen by them or by `bounds`, got both")
        check_signs(signs)
        signs.check(q, k)
        pages = sign_pages(
            q, signs, page=page, selected=selected, initial=initial, local=local,
            leftpad=leftpad, used=used,
        )  # fmt: skip
        return attend_verified(q, k, v, call(None, pages))
    if bounds is None:
        bounds = pool_keys(k, units=units_of(page), leftpad=leftpad)
    check_tensor("bounds", bounds)
    check_dtype("bounds", bounds, q.dtype)
    check_device("bounds", bounds, q.device)
    check_shape("bounds", bounds, "B pages Hk 2D", B=k.shape[0], Hk=k.shape[2])
    if bounds.shape[1] < k.shape[1] // page or bounds.shape[3] != 2 * k.shape[3]:
        wanted = f"[B pages Hk 2D] with at least {k.shape[1] // page} pages, D={k.shape[3]}"
        raise ValueError(f"`bounds`: expected {wanted}, got {list(bounds.shape)}")
    return attend_verified(q, k, v, call(bounds))


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, leftpad: Tensor | None, used: Tensor | None
) -> None:
    check_tensor("q", q)
    check_dtype("q", q, *FLOATS)
    check_shape("q", q, "B 1 H D", **{"1": 1})
    B, _, H, D = q.shape
    for name, value, dims, sizes in (
        ("k", k, "B T Hk D", {"B": B, "D": D}),
        ("v", v, "B T Hk Dv", {"B": B, **dict(zip(("T", "Hk"), k.shape[1:3]))}),
    ):
        check_tensor(name, value)
        check_dtype(name, value, q.dtype)
        check_shape(name, value, dims, **sizes)
        check_device(name, value, q.device)
    if k.numel() == 0 or H == 0 or H % k.shape[2]:
        raise ValueError(f"`q`: expected a multiple of Hk={k.shape[2]} heads, and keys; got {H}")
    for name, lengths in (("leftpad", leftpad), ("used", used)):
        if lengths is not None:
            check_tensor(name, lengths)
            check_dtype(name, lengths, torch.int32)
            check_shape(name, lengths, "B", B=B)
            check_device(name, lengths, q.device)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("`q`, `k`, `v`: expected tensors without gradient: sampling has none")
