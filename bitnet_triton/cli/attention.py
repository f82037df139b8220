"""The options by which a command chooses how a model attends."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from bitnet_triton.cli.arguments import MOST_TOKENS, WrongArgumentError, number

HELP = (
    "How tokens attend: a mode (`sliding`, `streaming`, `longformer`, `local`, `strided`, `fixed`, "
    "`top_k`, `threshold`, `pooled_blocks`, `indexed_blocks`, `quest`, `native_sparse`, "
    "`lsh_sampling`, `verified_sampling`, `reformer`, `routing`, `linear`, `full`), a preset of "
    "sliding window adaptation (`swaa-untrained`, `swaa-untrained-fast`, `swaa-trained`, "
    "`swaa-trained-fast`, or `swaa` to set everything yourself), each with settings behind it if "
    "so wished (`sliding:window=256,sinks=4`), or JSON as in config.attention, or a file that ends "
    "in `.json` and has that."
)
Attention = Annotated[str | None, typer.Option(help=HELP)]
Window = Annotated[
    int | None,
    typer.Option(
        help="Tokens that each one sees, itself included.",
        parser=number("--window", int, least=1, most=MOST_TOKENS),
        metavar="INTEGER",
    ),
]
Sinks = Annotated[
    int | None,
    typer.Option(
        help="First tokens that all later ones see as well.",
        parser=number("--sinks", int, least=0, most=MOST_TOKENS),
        metavar="INTEGER",
    ),
]
Block = Annotated[
    int | None,
    typer.Option(
        help="Length of a block (`local`, `strided`, `fixed`).",
        parser=number("--block", int, least=1, most=MOST_TOKENS),
        metavar="INTEGER",
    ),
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
        WrongArgumentError: a setting stands without a mode, the JSON is broken, or
            ``full_layers`` is no list of numbers and no word.
    """
    settings = {
        "window": window, "sinks": sinks, "block": block, "full_decode": full_decode,
        "full_layers": None if full_layers is None else _layers(full_layers),
    }  # fmt: skip
    settings = {name: value for name, value in settings.items() if value is not None}
    if attention is None:
        if settings:
            option = _OPTIONS.get(next(iter(settings)), "--" + next(iter(settings)))
            raise WrongArgumentError(f"`{option}`: expected `--attention` beside it")
        return None
    return {**_named(attention), **settings}


_OPTIONS = {"full_decode": "--full-decode/--windowed-decode", "full_layers": "--full-layers"}


def check_attention(attention: dict[str, Any] | None, config: Any) -> None:
    """Raise WrongArgumentError unless a model with that config can attend so."""
    from bitnet_triton.attention import AttentionPlan

    if attention is None:
        return
    if config.model_type not in ("bitnet", "bitnet_triton"):
        raise WrongArgumentError(
            f"`--attention`: expected a model of type bitnet, got one of type {config.model_type}"
        )
    layers = config.num_hidden_layers
    try:
        AttentionPlan.from_config(attention, layers).check_layers(layers)
    except (TypeError, ValueError) as error:
        raise WrongArgumentError(str(error).replace("`attention`", "`--attention`", 1)) from error


def _named(attention: str) -> dict[str, Any]:
    from bitnet_triton.attention.swaa import PRESETS

    if attention.lstrip().startswith("{"):
        try:
            return json.loads(attention)
        except json.JSONDecodeError as error:
            raise WrongArgumentError(f"`--attention`: expected JSON ({error})") from error
    if attention.endswith(".json"):
        from bitnet_triton.training.options import read_json

        try:
            return read_json(attention, "--attention")
        except ValueError as error:
            raise WrongArgumentError(str(error)) from error
    if ":" in attention:
        from bitnet_triton.training.settings import parse_setting

        try:
            return dict(parse_setting(attention).attention or {})
        except ValueError as error:
            raise WrongArgumentError(str(error).replace("`attention`", "`--attention`")) from error
    return {"preset" if attention in PRESETS else "mode": attention}


def _layers(text: str) -> str | list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise WrongArgumentError(
            f"`--full-layers`: expected `odd`, `even`, `every-N` or `1,5`, got {text!r}"
        )
    return [int(part) for part in parts] if all(map(str.isdecimal, parts)) else text
