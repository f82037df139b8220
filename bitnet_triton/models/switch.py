"""enable() and disable(): let transformers' own entry points give our layers."""

from __future__ import annotations

import functools
import logging
from typing import Any

import transformers.models.bitnet.modeling_bitnet as hf
import transformers.models.llama.modeling_llama as hf_llama
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.bitnet.configuration_bitnet import BitNetConfig as HfBitNetConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer

from bitnet_triton.errors import CheckpointError
from bitnet_triton.models.bitnet import BitNetForCausalLM, BitNetModel
from bitnet_triton.models.fuse import fuse_after_loading
from bitnet_triton.models.onebit import config_objection, tensors_objection
from bitnet_triton.models.quantizer import PUBLISHED_METHOD, TernaryHfQuantizer

logger = logging.getLogger("bitnet_triton")


class _FusingHfQuantizer(TernaryHfQuantizer):
    """Fuses what it has loaded: models of transformers' own classes have no such switch."""

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        return fuse_after_loading(super()._process_model_after_weight_loading(model, **kwargs))


_MODELS: dict[Any, type] = {AutoModel: BitNetModel, AutoModelForCausalLM: BitNetForCausalLM}
# Some loaders take the class that a config names instead of an Auto class: trl, given a path
_NAMED: dict[Any, Any] = {
    hf.BitNetModel: BitNetModel,
    hf.BitNetForCausalLM: BitNetForCausalLM,
}

_LLAMA: Any = hf_llama.LlamaPreTrainedModel


def _loads_ours(named: Any, ours: Any) -> classmethod:
    @functools.wraps(named.from_pretrained.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is named:
            return ours.from_pretrained(*args, **kwargs)
        return super(named, cls).from_pretrained(*args, **kwargs)  # a subclass: ours are some

    return classmethod(from_pretrained)


def _load_llama(
    model: Any, state_dict: Any, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
) -> Any:
    """Load a Llama as transformers does, unless its checkpoint is no Llama's."""
    load_config = args[0] if args else kwargs.get("load_config")
    is_adapter = len(args) > 1 or kwargs.get("expected_keys") is not None
    is_plain = type(model).__module__ == hf_llama.__name__ and not is_adapter
    if is_plain and getattr(load_config, "hf_quantizer", None) is None:
        objection = config_objection(model.config) or tensors_objection(checkpoint_files or [])
        if objection is not None:
            raise CheckpointError(f"{model.config.name_or_path}: {objection}")
    return PreTrainedModel._load_pretrained_model(
        model, state_dict, checkpoint_files, *args, **kwargs
    )


def enable() -> None:
    """Make the Auto classes, the BitNet classes and the ``bitnet`` quantiser give our layers.

    For code that loads models itself: ``pipeline``, evaluation harnesses, servers. Holds for
    models loaded from now on, of every architecture; ``disable()`` undoes it. Their inference is
    fused where that can be; ``bitnet_triton.unfuse(model)`` undoes that. A ternary checkpoint that
    calls itself a dense Llama (1bitLLM's) is refused with ``CheckpointError`` while it is loaded.
    """
    AUTO_QUANTIZER_MAPPING[PUBLISHED_METHOD] = _FusingHfQuantizer
    for auto, model in _MODELS.items():
        # not auto.register: transformers 5.17 ignores it, silently, for a config of its own
        auto._model_mapping._extra_content[HfBitNetConfig] = model
    for named, ours in _NAMED.items():
        if "from_pretrained" not in vars(named):
            named.from_pretrained = _loads_ours(named, ours)
    _LLAMA._load_pretrained_model = staticmethod(_load_llama)
    logger.info("transformers loads `quant_method: bitnet` checkpoints with bitnet_triton")


def disable() -> None:
    """Undo ``enable()``; models that are loaded stay as they are."""
    AUTO_QUANTIZER_MAPPING[PUBLISHED_METHOD] = BitNetHfQuantizer
    for auto in _MODELS:
        auto._model_mapping._extra_content.pop(HfBitNetConfig, None)
    for named in _NAMED:
        if "from_pretrained" in vars(named):
            del named.from_pretrained
    if "_load_pretrained_model" in vars(_LLAMA):
        del _LLAMA._load_pretrained_model
    logger.info("transformers loads `quant_method: bitnet` checkpoints with its own layers")
