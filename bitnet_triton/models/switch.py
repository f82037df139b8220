"""enable() and disable(): let transformers' own entry points give our layers."""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.bitnet.configuration_bitnet import BitNetConfig as HfBitNetConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer

from bitnet_triton.models.bitnet import BitNetForCausalLM, BitNetModel
from bitnet_triton.models.fuse import fuse_after_loading
from bitnet_triton.models.quantizer import PUBLISHED_METHOD, TernaryHfQuantizer

logger = logging.getLogger("bitnet_triton")


class _FusingHfQuantizer(TernaryHfQuantizer):
    """Fuses what it has loaded: models of transformers' own classes have no such switch."""

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        return fuse_after_loading(super()._process_model_after_weight_loading(model, **kwargs))


_MODELS: dict[Any, type] = {AutoModel: BitNetModel, AutoModelForCausalLM: BitNetForCausalLM}


def enable() -> None:
    """Make the Auto classes and the ``bitnet`` quantiser of transformers give our layers.

    For code that loads models itself: ``pipeline``, evaluation harnesses, servers. Holds for
    models loaded from now on, of every architecture; ``disable()`` undoes it. Their inference is
    fused where that can be; ``bitnet_triton.unfuse(model)`` undoes that.
    """
    AUTO_QUANTIZER_MAPPING[PUBLISHED_METHOD] = _FusingHfQuantizer
    for auto, model in _MODELS.items():
        # not auto.register: transformers 5.17 ignores it, silently, for a config of its own
        auto._model_mapping._extra_content[HfBitNetConfig] = model
    logger.info("transformers loads `quant_method: bitnet` checkpoints with bitnet_triton")


def disable() -> None:
    """Undo ``enable()``; models that are loaded stay as they are."""
    AUTO_QUANTIZER_MAPPING[PUBLISHED_METHOD] = BitNetHfQuantizer
    for auto in _MODELS:
        auto._model_mapping._extra_content.pop(HfBitNetConfig, None)
    logger.info("transformers loads `quant_method: bitnet` checkpoints with its own layers")
