"""Pages in plain PyTorch (arXiv:2309.06180, section 4): the oracle of the tests."""

from __future__ import annotations

from torch import Tensor


def write_pages_reference(
    k_pages: Tensor, v_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor
) -> None:
    """Write tokens k [T Hk D] and v [T Hk Dv] to ``slots`` [T] of pages [P page Hk D], in place."""
    P, page_size = k_pages.shape[:2]
    kept = (slots >= 0) & (slots < P * page_size)
    page, place = slots[kept] // page_size, slots[kept] % page_size
    k_pages[page, place] = k[kept]
    v_pages[page, place] = v[kept]


def copy_pages_reference(pages: Tensor, pairs: Tensor) -> None:
    """Copy pages [P ...] from pairs[:, 0] to pairs[:, 1], in place."""
    inside = ((pairs >= 0) & (pairs < pages.shape[0])).all(1)
    source, target = pairs[inside].unbind(1)
    pages[target] = pages[source]
