"""``bitnet-triton pack``: convert a checkpoint between master weights and packed weights."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bitnet_triton.cli.arguments import parse_dtype

console = Console(highlight=False)


class Format(str, Enum):
    """What the new checkpoint holds."""

    packed = "packed"
    masters = "masters"


def pack(
    source: Annotated[str, typer.Argument(help="Folder or model on the Hub; never changed.")],
    target: Annotated[Path, typer.Argument(help="New folder; one that holds files is refused.")],
    to: Annotated[
        Format, typer.Option(help="`packed`: 2 bits a weight. `masters`: trainable weights.")
    ] = Format.packed,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of all other tensors: `bfloat16`, `float16`, `float32`. Default: kept."),
    ] = None,
) -> None:
    """Convert a checkpoint: bf16 master weights to packed ternary ones, and back.

    Every tensor is read back and compared with the source before the target folder appears; when
    anything differs, nothing is left behind. Both directions keep the ternary codes exactly, and
    transformers reads both results without this package.

    **Examples**

    - `bitnet-triton pack runs/tiny runs/tiny-packed --dtype bfloat16`

    - `bitnet-triton pack microsoft/bitnet-b1.58-2B-4T ./masters --to masters`
    """
    from bitnet_triton.models.convert import convert_checkpoint

    done = convert_checkpoint(
        source, target, to=to.value, dtype=parse_dtype(dtype) if dtype else None
    )
    console.print(
        f"{done.layers} ternary matrices, {done.tensors} tensors, all checked: "
        f"{done.bytes_before / 1e6:.1f} MB -> [bold]{done.bytes_after / 1e6:.1f} MB[/] "
        f"in {done.target}"
    )
