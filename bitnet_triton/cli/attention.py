"""The options by which a command chooses how a model attends."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

HELP = (
    "How tokens attend: a mode (`sliding`, `streaming`, `longformer`, `local`, `strided`, `fixed`, "
    "`full`), a preset of sliding window adaptation (`swaa-untrained`, `swaa-untrained-fast`, "
    "`swaa-trained`, `swaa-trained-fast`, or `swaa` to set everything yourself), or JSON as in "
    "config.attention."
)
Attention = Annotated[str | None, typer.Option(help=HELP)]
Window = Annotated[
    int | None, typer.Option(min=1, help="Tokens that each one sees, itself included.")
]
Sinks = Annotated[
    int | None, typer.Option(min=0, help="First tokens that all later ones see as well.")
]
Block = Annotated[
    int | None, typer.Option(min=1, help="Length of a block (`local`, `strided`, `fixed`).")
]
FullDecode = Annotated[
    bool | None,
    typer.Option(
        "--full-decode/--windowed-decode", help="Let generated tokens see everything (`swaa`)."
    ),
]
FullLayers = Annotated[
    str | None,
    typer.Option(help="Layers that see everything (`swaa`): `odd`, `even`, `every-4` or `1,5`."),
]


def parse_attention(
    attention: str | None,
    *,
    window: int | None,
    sinks: int | None,
    block: int | None,
    full_decode: bool | None,
    full_layers: str | None,
) -> dict[str, Any] | None:
    """Turn the options into ``config.attention``; None where none is given.

    Raises:
        ValueError: a setting stands without a mode, the JSON is broken, or ``full_layers`` is no
            list of numbers and no word.
    """
    settings = {
        "window": window, "sinks": sinks, "block": block, "full_decode": full_decode,
        "full_layers": None if full_layers is None else _layers(full_layers),
    }  # fmt: skip
    settings = {name: value for name, value in settings.items() if value is not None}
    if attention is None:
        if settings:
            option = next(iter(settings)).replace("_", "-")
            raise ValueError(f"`--{option}`: expected `--attention` beside it")
        return None
    return {**_named(attention), **settings}


def _named(attention: str) -> dict[str, Any]:
    from bitnet_triton.attention.swaa import PRESETS

    if attention.lstrip().startswith("{"):
        try:
            return json.loads(attention)
        except json.JSONDecodeError as error:
            raise ValueError(f"`--attention`: expected JSON ({error})") from error
    return {"preset" if attention in PRESETS else "mode": attention}


def _layers(text: str) -> str | list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [int(part) for part in parts] if all(map(str.isdecimal, parts)) else text
