"""``bitnet-triton pack``: convert a checkpoint between master weights and packed weights."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bitnet_triton.cli.arguments import Dtype, WrongArgumentError
from bitnet_triton.cli.checkpoint import find_checkpoint, one_line, read_config
from bitnet_triton.errors import CheckpointError

console = Console(highlight=False)


class Format(str, Enum):
    """What the new checkpoint holds."""

    packed = "packed"
    masters = "masters"


def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder or a model on the Hub; `tiny` and `recall` are embedded. Never changed.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="New folder; one that holds files is refused.")
    ],
    to: Annotated[
        Format, typer.Option(help="`packed`: 2 bits a weight. `masters`: trainable weights.")
    ] = Format.packed,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of all tensors that are not packed. Default: kept."),
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
    found = find_checkpoint(source, "SOURCE")
    _check_target(target)
    read_config(found, source, "SOURCE")

    from bitnet_triton.models.convert import convert_checkpoint

    wanted = dtype.to_torch() if dtype else None
    with one_line(source, "SOURCE"):
        try:
            done = convert_checkpoint(found, target, to=to.value, dtype=wanted)
        except CheckpointError:
            raise
        except ValueError as error:
            text = str(error).replace("`source`", "`SOURCE`").replace("`target`", "`TARGET`")
            raise WrongArgumentError(text) from error
    console.print(
        f"{done.layers} ternary matrices, {done.tensors} tensors, all checked: "
        f"{done.bytes_before / 1e6:.1f} MB -> [bold]{done.bytes_after / 1e6:.1f} MB[/] "
        f"in {done.target}"
    )


def _check_target(target: Path) -> None:
    """Refuse a folder with files, and one that cannot be made."""
    wanted = "`TARGET`: expected a new or empty folder, got"
    if target.is_dir():
        if any(target.iterdir()):
            raise WrongArgumentError(f"{wanted} {target}, which has files")
    elif target.is_symlink() or target.exists():
        raise WrongArgumentError(f"{wanted} {target}, a file")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise WrongArgumentError(f"`TARGET`: expected a folder above {target.name}, got {above}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise WrongArgumentError(f"`TARGET`: expected a folder to write to, got {above}")
