"""enable() and disable(): let transformers' own entry points give our layers."""

from __future__ import annotations

import logging

from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.bitnet.configuration_bitnet import BitNetConfig as HfBitNetConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer

from bitnet_triton.models.bitnet import BitNetForCausalLM, BitNetModel
from bitnet_triton.models.quantizer import TernaryHfQuantizer

logger = logging.getLogger("bitnet_triton")

_MODELS = {AutoModel: BitNetModel, AutoModelForCausalLM: BitNetForCausalLM}


def enable() -> None:
    """Make the Auto classes and the ``bitnet`` quantiser of transformers give our layers.

    For code that loads models itself: ``pipeline``, evaluation harnesses, servers. Holds for
    models loaded from now on, of every architecture; ``disable()`` undoes it.
    """
    AUTO_QUANTIZER_MAPPING["bitnet"] = TernaryHfQuantizer
    for auto, model in _MODELS.items():
        auto.register(HfBitNetConfig, model, exist_ok=True)
    logger.info("transformers loads `quant_method: bitnet` checkpoints with bitnet_triton")


def disable() -> None:
    """Undo ``enable()``; models that are loaded stay as they are."""
    AUTO_QUANTIZER_MAPPING["bitnet"] = BitNetHfQuantizer
    for auto in _MODELS:
        auto._model_mapping._extra_content.pop(HfBitNetConfig, None)
    logger.info("transformers loads `quant_method: bitnet` checkpoints with its own layers")
