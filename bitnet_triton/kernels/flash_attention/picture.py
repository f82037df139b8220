"""Pictures of a mask: text for a terminal, a figure for a document."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.kernels.flash_attention.description import MaskDescription

_SHADES = "·░▒▓█"  # of a tile's keys: none, up to a third, up to two thirds, fewer than all, all


def draw_mask(mask: MaskDescription, visible: Tensor, head: int, width: int) -> str:
    """Draw bool [Hd Tq Tk] in at most ``width`` characters a line, under a line of settings."""
    matrix = visible[head if visible.shape[0] > 1 else 0]
    shares, tile = _shares(matrix, width)
    seen, pairs = int(matrix.sum()), matrix.numel()
    size = f"{matrix.shape[0]} queries x {matrix.shape[1]} keys"
    scale = "" if tile == 1 else f", a character is {tile} x {tile}"
    share = 100 * seen / max(pairs, 1)
    lines = ["".join(map(_shade, row)) for row in shares.tolist()]
    return "\n".join([_title(mask), f"{size}, {share:.1f} % visible{scale}", *lines])


def plot_mask(mask: MaskDescription, visible: Tensor, head: int) -> Any:
    """Draw bool [Hd Tq Tk] as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a figure needs matplotlib: install bitnet-triton[bench]; "
            "Mask.explain draws the same as text"
        ) from error
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    matrix = visible[head if visible.shape[0] > 1 else 0]
    axes.imshow(matrix.cpu().numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(title=_title(mask), xlabel="key", ylabel="query")
    return figure


def _title(mask: MaskDescription) -> str:
    shown = []
    for name in mask.__dataclass_fields__:
        value = getattr(mask, name)
        if isinstance(value, Tensor):
            shown.append(f"{name}=<{' '.join(map(str, value.shape))}>")
        elif name == "causal" or value != mask.__dataclass_fields__[name].default:
            shown.append(f"{name}={value!r}")
    return f"Mask({', '.join(shown)})"


def _shares(matrix: Tensor, width: int) -> tuple[Tensor, int]:
    """Return the visible share of each tile, and the side of a tile."""
    Tq, Tk = matrix.shape
    tile = max(1, -(-max(Tq, Tk) // width))
    values = matrix.float()[None, None]
    if tile > 1:
        # tiles at the edge count the pairs that exist
        values = F.avg_pool2d(values, tile, ceil_mode=True, count_include_pad=False)
    return values[0, 0], tile


def _shade(share: float) -> str:
    if share == 0:
        return _SHADES[0]
    return _SHADES[4] if share == 1 else _SHADES[1 + min(2, int(3 * share))]
