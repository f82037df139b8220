"""The configuration: transformers' own BitNet config with the settings of this package."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.bitnet.configuration_bitnet import BitNetConfig as HfBitNetConfig

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.cache import parse_memory
from bitnet_triton.models.onebit import config_objection
from bitnet_triton.models.quantizer import in_memory, on_disk
from bitnet_triton.models.rotary import DYNAMIC_YARN
from bitnet_triton.models.tensor_parallel import DECODER_PLAN

PLAIN_MODEL_TYPE = "bitnet"
OWN_MODEL_TYPE = "bitnet_triton"

# Master weights that are quantised in every forward: what a model that is built fresh trains
ONLINE = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
}


class BitNetConfig(HfBitNetConfig):
    """Configuration of a BitNet model; every field of transformers' BitNetConfig, and four more.

    Args:
        attention: an attention mode by name (``"full"``), or as a dict with ``mode`` and its
            settings; or a plan, a dict with ``prefill`` and ``decode``, each of them a mode or a
            list with a mode for each layer. None leaves attention to transformers. A config with
            a mode, with ``cache``, with reversible layers, or with rope type ``dynamic_yarn``, is
            saved under the model type ``bitnet_triton``, any other as plain ``bitnet``.
        reversible: attention and MLP of a layer run on two streams (arXiv:2001.04451, section 3),
            and training keeps the activations of no layer. Such a model goes without a cache:
            ``use_cache`` is False.
        use_cache: whether a call without an answer of its own returns a cache. None, the default:
            True unless ``reversible``.
        cache: the memory of layers whose modes keep everything, by name (``"h2o"``), or as a dict
            with ``name`` and its settings; with it ``attention`` is ``"full"`` unless it says
            otherwise. None: keys and values of all tokens.
        quantization_config: how the linears are quantised, as in published checkpoints. A fresh
            config has trainable ternary linears (``autobitlinear``, ``online``); a ``config.json``
            without the field, and an explicit None, mean dense linears, as in transformers.

    Raises:
        TypeError: ``attention``, ``cache``, ``reversible`` or ``quantization_config`` is of a wrong
            type.
        ValueError: ``attention`` or ``cache`` names something unknown, or they do not go together;
            ``reversible`` meets ``use_cache``, ``cache`` or a mode that cannot run twice;
            ``quant_method`` is not ``bitnet``; the file that is read belongs to another model type.
    """

    model_type = OWN_MODEL_TYPE
    base_model_tp_plan = DECODER_PLAN

    attention: str | dict | None = None
    cache: str | dict | None = None
    reversible: bool = False
    use_cache: bool | None = None  # type: ignore[assignment]  # None: by `reversible`

    def __post_init__(self, **kwargs: Any) -> None:
        quantization_config = kwargs.pop("quantization_config", ONLINE)
        if quantization_config is not None:
            kwargs["quantization_config"] = in_memory(quantization_config)
        if self.use_cache is None:
            self.use_cache = not self.reversible
        super().__post_init__(**kwargs)
        plan = None
        if self.attention is not None or self.cache is not None:
            layers = self.num_hidden_layers
            plan = AttentionPlan.from_config(self.attention or "full", layers, self.cache)
            plan.check_layers(layers)
        self.check_reversible(plan)

    def check_reversible(self, plan: AttentionPlan | None) -> None:
        """Raise where the layers are to be reversible and something else stands against it.

        Args:
            plan: what ``attention`` says, or will say.

        Raises:
            TypeError: ``reversible`` is no bool.
            ValueError: ``use_cache`` or ``cache`` is wanted, or a mode cannot run twice.
        """
        if not isinstance(self.reversible, bool):
            got = type(self.reversible).__name__
            raise TypeError(f"`reversible`: expected True or False, got {got}")
        if not self.reversible:
            return
        if self.use_cache:
            raise ValueError("`use_cache`: expected False beside `reversible`, got True")
        if self.cache is not None:
            raise ValueError("`cache`: expected none beside `reversible`, which goes without")
        for mode in plan or ():
            if mode.recompute_objection is not None:
                raise ValueError(
                    f"`reversible`: attention {mode.name!r} cannot run again in the backward: "
                    f"{mode.recompute_objection}"
                )

    def __setattr__(self, name: str, value: Any) -> None:
        # here and not in __post_init__: from_pretrained sets its keyword arguments afterwards
        if name == "attention" and value is not None:
            value = AttentionPlan.from_config(value, self.num_hidden_layers).to_config()
        if name == "cache" and value is not None:
            value = parse_memory(value).to_data()
        if name == "use_cache" and value is None:
            object.__setattr__(self, name, value)  # transformers checks for a bool
        else:
            super().__setattr__(name, value)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a ``config.json``; refuse one of another model type."""
        config_dict, unused = super().get_config_dict(*args, **kwargs)
        return _checked(config_dict), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> BitNetConfig:
        """Build a config from what ``to_dict`` returned; refuse one of another model type."""
        return super().from_dict(_checked(config_dict), **kwargs)

    @classmethod
    def from_hf(cls, config: PreTrainedConfig) -> BitNetConfig:
        """Turn a config of transformers' own class into one of this class."""
        if isinstance(config, cls):
            return config
        own = cls.from_dict(config.to_dict())
        # these live outside of the dictionary
        own._attn_implementation = config._attn_implementation
        own.name_or_path = config.name_or_path
        return own

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; a config without a setting of ours is a plain ``bitnet`` one."""
        return self._published(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, as it is written to ``config.json``."""
        return self._published(super().to_diff_dict())

    @property
    def _has_own_rope(self) -> bool:
        """Whether transformers alone does not know the rope type, and has to refuse the model."""
        return (self.rope_parameters or {}).get("rope_type") == DYNAMIC_YARN

    def _published(self, output: dict[str, Any]) -> dict[str, Any]:
        for name in ("attention", "cache"):
            if getattr(self, name) is None:
                output.pop(name, None)
        if not self.reversible:
            output.pop("reversible", None)
        has_own = self.attention is not None or self.cache is not None or self.reversible
        if not has_own and not self._has_own_rope:
            output["model_type"] = PLAIN_MODEL_TYPE
        if output.get("quantization_config") is not None:
            output["quantization_config"] = on_disk(output["quantization_config"])
        return output


def _checked(config_dict: dict[str, Any]) -> dict[str, Any]:
    found = config_dict.get("model_type", PLAIN_MODEL_TYPE)
    if found not in (PLAIN_MODEL_TYPE, OWN_MODEL_TYPE):
        objection = config_objection(config_dict)
        if objection is not None:
            raise ValueError(objection)
        raise ValueError(
            f"`model_type`: expected {PLAIN_MODEL_TYPE!r} or {OWN_MODEL_TYPE!r}, got "
            f"{found!r}; load another ternary model with transformers and pass it to "
            "bitnet_triton.use_ternary_kernels"
        )
    return {"quantization_config": None, **config_dict, "model_type": OWN_MODEL_TYPE}
