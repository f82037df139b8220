"""extend_context: a model reads texts longer than those that it was trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from bitnet_triton.models.fuse import unfused
from bitnet_triton.models.rotary import BY_LENGTH, DYNAMIC_YARN

Model = TypeVar("Model", bound=nn.Module)
Parameters = dict[str, Any]

FACTOR = 4
_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "truncate")


def extend_context(
    model: Model,
    factor: float = FACTOR,
    method: str = "yarn",
    *,
    original_max_position_embeddings: int | None = None,
    **options: Any,
) -> Model:
    """Rescale the rotary embedding of a model for longer texts, in place.

    The config says so in transformers' own ``rope_parameters``, and ``save_pretrained`` keeps it;
    ``max_position_embeddings`` grows by ``factor`` (except with "dynamic", which counts from it). A
    second call starts again from the trained length. Caches that hold tokens are refused by the
    model from now on.

    Args:
        model: ``BitNetForCausalLM``, ``BitNetModel``, or a model of transformers with a rotary
            embedding of its own.
        factor: how many times the trained length, at least 1.
        method: how frequencies change.

            - "yarn" (arXiv:2309.00071): fast ones stay, slow ones are divided by ``factor``, a
              ramp between them; scores get the paper's temperature. What one picks.
            - "dynamic_yarn" (section 3.4): YaRN with the factor that a text needs, at most
              ``factor``: short texts are read as before.
            - "ntk": the base grows by factor^(D / (D - 2)). Saved as another base, of which nobody
              can tell that it is not the trained one: the only method that a second call extends.
            - "dynamic": the base grows with the text, as in transformers.
            - "linear" (arXiv:2306.15595): all are divided by ``factor``.
            - "longrope" (arXiv:2402.13753): each is divided by a number of its own, of
              ``short_factor`` for texts up to the trained length and of ``long_factor`` beyond.
        original_max_position_embeddings: the trained length. Default: what ``rope_parameters``
            say, or ``max_position_embeddings``.
        **options: for "yarn" and "dynamic_yarn" ``beta_fast`` (32), ``beta_slow`` (1), ``truncate``
            and ``attention_factor``; for "longrope" ``long_factor``, ``short_factor`` (lists of
            D / 2 numbers; default of the latter: ones) and ``attention_factor``.

    Returns:
        The same model.

    Methods that depend on the length of a text ("dynamic", "dynamic_yarn", "longrope") choose when
    a cache is empty and keep to it: ``generate`` knows how long a text may get, another loop says
    so by ``context_length``. Rows of a batch are treated as they would be alone.

    Raises:
        TypeError: ``model`` has no rotary embedding that can be rescaled, or a value is no number.
        ValueError: the method or an option is unknown, or a value is out of range. Nothing was
            changed then.
    """
    decoder = _decoder(model)
    config = copy.copy(decoder.config)
    known = decoder.config.rope_parameters
    layout = {name: value for name, value in known.items() if isinstance(value, Mapping)}
    trained = original_max_position_embeddings
    if layout:  # a set for each type of layer
        changed: Parameters = {
            name: _rescaled(config, value, factor, method, trained, options)
            for name, value in layout.items()
        }
        rescaled = next(iter(changed.values()))
    else:
        changed = rescaled = _rescaled(config, known, factor, method, trained, options)
    _check_class(decoder, rescaled["rope_type"])
    length = trained or _trained_length(config, next(iter(layout.values()), known))
    grown = length if method == "dynamic" else math.ceil(length * factor)
    config.rope_parameters, config.max_position_embeddings = changed, grown
    rotary = type(decoder.rotary_emb)(config)  # raises before anything has changed
    decoder.config.rope_parameters = changed
    decoder.config.max_position_embeddings = grown
    rotary.config = decoder.config
    _replace(model, decoder, rotary.to(decoder.rotary_emb.inv_freq.device))
    return model


def stretch_of(model: nn.Module, factor: float, method: str) -> list[float]:
    """Return by what a method divides each frequency, [D / 2], counted from the trained length.

    Args:
        model: as for ``extend_context``; it stays as it is.
        factor: how many times the trained length.
        method: "linear", "ntk" or "yarn".

    Raises:
        ValueError: the method is unknown, or frequencies differ by the type of layer.
    """
    decoder = _decoder(model)
    known = decoder.config.rope_parameters
    if any(isinstance(value, Mapping) for value in known.values()):
        raise ValueError("`model`: expected one set of frequencies, got one for each type of layer")
    config, plain = copy.copy(decoder.config), {**known, "rope_type": "default"}
    rotary = type(decoder.rotary_emb)
    slower = []
    for parameters in (plain, _rescaled(config, known, factor, method, None, {})):
        config.rope_parameters = parameters
        slower.append(rotary(config).inv_freq.double())
    ratios = (slower[0] / slower[1]).clamp_min(1).cummax(-1).values
    return [round(ratio, 6) for ratio in ratios.tolist()]


def _decoder(model: nn.Module) -> Any:
    decoder = model.base_model if isinstance(model, PreTrainedModel) else None
    if not hasattr(decoder, "rotary_emb"):
        raise TypeError(
            "`model`: expected a model of transformers with a rotary embedding, before adapters "
            f"are added, got {type(model).__name__}"
        )
    return decoder


def _check_class(decoder: Any, rope_type: str) -> None:
    """Refuse types by length where nobody would keep a cache to its choice."""
    if rope_type in BY_LENGTH and not hasattr(decoder.rotary_emb, "depends_on_length"):
        raise ValueError(
            f"`method`: {type(decoder).__name__} would mix keys that are rotated by "
            f"{rope_type!r} for different lengths in one cache; expected a BitNet model of this "
            "package, or a method that does not depend on the length"
        )


def _replace(model: nn.Module, decoder: Any, rotary: Any) -> None:
    with unfused(model):  # recorded steps hold angles
        use = getattr(decoder, "use_rotary", None) or getattr(model, "use_rotary", None)
        if use is None:
            decoder.rotary_emb = rotary
        else:
            use(rotary)


def _trained_length(config: Any, parameters: Mapping[str, Any]) -> int:
    length = parameters.get("original_max_position_embeddings")
    if length is None:
        length = config.max_position_embeddings
        if parameters["rope_type"] == "linear":
            length = round(length / parameters["factor"])
    return int(length)


def _rescaled(
    config: Any,
    known: Mapping[str, Any],
    factor: float,
    method: str,
    trained: int | None,
    options: Parameters,
) -> Parameters:
    """Return rope parameters that stretch ``known`` by ``factor``."""
    if method not in _METHODS:
        raise ValueError(f"`method`: expected one of {', '.join(_METHODS)}, got {method!r}")
    build, allowed = _METHODS[method]
    for name in options:
        if name not in allowed:
            wanted = ", ".join(allowed) or "no options"
            raise ValueError(f"`{name}`: {method!r} takes {wanted}")
    _check_number("factor", factor, least=1)
    if trained is not None and (not isinstance(trained, int) or trained < 1):
        raise ValueError(f"`original_max_position_embeddings`: expected at least 1, got {trained}")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(head * known.get("partial_rotary_factor", 1))
    base: Parameters = {
        name: known[name] for name in ("rope_theta", "partial_rotary_factor") if name in known
    }
    length = trained or _trained_length(config, known)
    return {**base, **build(base["rope_theta"], width, factor, length, options)}


def _linear(theta: float, D: int, factor: float, length: int, options: Parameters) -> Parameters:
    return {"rope_type": "linear", "factor": float(factor)}


def _dynamic(theta: float, D: int, factor: float, length: int, options: Parameters) -> Parameters:
    return {"rope_type": "dynamic", "factor": float(factor)}


def _ntk(theta: float, D: int, factor: float, length: int, options: Parameters) -> Parameters:
    return {"rope_type": "default", "rope_theta": theta * factor ** (D / (D - 2))}


def _yarn(theta: float, D: int, factor: float, length: int, options: Parameters) -> Parameters:
    for name in set(options) - {"truncate"}:
        _check_number(name, options[name])
    fast, slow = options.get("beta_fast", 32), options.get("beta_slow", 1)
    if fast < slow:
        raise ValueError(f"`beta_fast`: expected at least `beta_slow`, {slow}, got {fast}")
    more = {"factor": float(factor), "original_max_position_embeddings": length}
    return {"rope_type": "yarn", **more, **options}


def _dynamic_yarn(
    theta: float, D: int, factor: float, length: int, options: Parameters
) -> Parameters:
    return {**_yarn(theta, D, factor, length, options), "rope_type": DYNAMIC_YARN}


def _longrope(theta: float, D: int, factor: float, length: int, options: Parameters) -> Parameters:
    if "long_factor" not in options:
        raise ValueError(
            f"`long_factor`: 'longrope' expects {D // 2} numbers, as `bitnet-triton longrope` "
            "finds them"
        )
    found: Parameters = {"rope_type": "longrope", "factor": float(factor)}
    found["original_max_position_embeddings"] = length
    for name in ("short_factor", "long_factor"):
        found[name] = _checked_factors(name, options.get(name, [1.0] * (D // 2)), D // 2)
    if "attention_factor" in options:
        _check_number("attention_factor", options["attention_factor"])
        found["attention_factor"] = options["attention_factor"]
    return found


def _checked_factors(name: str, values: Any, count: int) -> list[float]:
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        got = len(values) if isinstance(values, Sequence) else type(values).__name__
        raise ValueError(f"`{name}`: expected a list of {count} numbers, got {got}")
    for value in values:
        _check_number(name, value)
    return [float(value) for value in values]


def _check_number(name: str, value: Any, least: float = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}`: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < least or value == 0:
        raise ValueError(f"`{name}`: expected a number of {least or 'more than 0'}, got {value}")


# method -> what builds its parameters, and the options that it takes
_METHODS: dict[str, tuple[Callable[..., Parameters], tuple[str, ...]]] = {
    "yarn": (_yarn, _YARN_OPTIONS),
    DYNAMIC_YARN: (_dynamic_yarn, _YARN_OPTIONS),
    "ntk": (_ntk, ()),
    "dynamic": (_dynamic, ()),
    "linear": (_linear, ()),
    "longrope": (_longrope, ("long_factor", "short_factor", "attention_factor")),
}
METHODS = tuple(cast("dict[str, Any]", _METHODS))
