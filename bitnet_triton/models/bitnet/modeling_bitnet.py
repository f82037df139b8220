"""BitNet models: transformers' own, with the linears of this package."""

from __future__ import annotations

import os
from typing import Any

import transformers.models.bitnet.modeling_bitnet as hf
from transformers import PreTrainedConfig

from bitnet_triton.models.bitnet.configuration_bitnet import BitNetConfig
from bitnet_triton.models.quantizer import in_memory_method, replace_linears


class _TernaryModel:
    """What both classes share: our config, our linears, our checks while loading."""

    config_class = BitNetConfig

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config = BitNetConfig.from_hf(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if getattr(config, "quantization_config", None) is not None:
            replace_linears(self, config.quantization_config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a BitNet checkpoint: packed, unpacked codes or master weights.

        Args:
            pretrained_model_name_or_path: a folder, or a model on the Hub.
            *model_args: passed to the model.
            config: replaces the checkpoint's own.
            **kwargs: as for any model of transformers.

        Raises:
            CheckpointError: tensors are missing, superfluous, of a wrong shape or dtype, hold an
                invalid code or scale, or the file is damaged; nothing is returned then.
            ValueError: the checkpoint belongs to another model type; the attention mode is
                unknown.
        """
        if not isinstance(config, PreTrainedConfig):
            source = config if config is not None else pretrained_model_name_or_path
            config, kwargs = BitNetConfig.from_pretrained(
                source, return_unused_kwargs=True, **kwargs
            )
        config = in_memory_method(BitNetConfig.from_hf(config))
        kwargs["use_safetensors"] = True  # pickled weights can run code: never read
        return super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *model_args, config=config, **kwargs
        )


class BitNetModel(_TernaryModel, hf.BitNetModel):
    """The BitNet decoder without a language-model head."""


class BitNetForCausalLM(_TernaryModel, hf.BitNetForCausalLM):
    """BitNet with a language-model head: ``from_pretrained``, ``generate``, ``Trainer``."""
