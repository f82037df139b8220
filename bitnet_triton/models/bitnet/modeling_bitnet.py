"""BitNet models: transformers' own, with the linears of this package."""

from __future__ import annotations

import os
from typing import Any

import transformers.models.bitnet.modeling_bitnet as hf
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig

from bitnet_triton.attention import AttentionPlan, hub
from bitnet_triton.errors import CheckpointError
from bitnet_triton.models.bitnet.configuration_bitnet import BitNetConfig
from bitnet_triton.models.checkpoint import check_checkpoint, check_folder, check_suffixes
from bitnet_triton.models.quantizer import replace_linears
from bitnet_triton.nn import use_output_head


def _prepared_plan(config: BitNetConfig) -> AttentionPlan | None:
    """Return the plan of ``config``, if any, and lead transformers' attention layers to it."""
    if config.attention is None:
        return None
    asked = config._attn_implementation
    if asked not in (None, hub.NAME):
        raise ValueError(
            f"`attn_implementation`: expected none beside `config.attention`, got {asked!r}"
        )
    config._attn_implementation = hub.NAME
    plan = AttentionPlan.from_config(config.attention)
    plan.check_layers(config.num_hidden_layers)  # again: keyword arguments come after its check
    return plan


class _TernaryModel(hf.BitNetPreTrainedModel):
    """What both classes share: our config, our linears, our checks while loading."""

    config_class = BitNetConfig

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config = BitNetConfig.from_hf(config)
        plan = _prepared_plan(config)
        super().__init__(config, *args, **kwargs)
        if plan is not None:
            hub.set_plan(self, plan)
        if getattr(config, "quantization_config", None) is not None:
            replace_linears(self, config.quantization_config)
        else:
            use_output_head(self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a BitNet checkpoint: packed, unpacked codes, master weights or dense.

        Args:
            pretrained_model_name_or_path: a folder, or a model on the Hub.
            *model_args: passed to the model.
            config: replaces the checkpoint's own.
            **kwargs: as for any model of transformers.

        Raises:
            CheckpointError: tensors are missing, superfluous, of a wrong shape or dtype, hold an
                invalid code or scale, a file is damaged or absent, or the weights are pickled;
                nothing is returned then.
            ValueError: the checkpoint belongs to another model type; the attention mode is
                unknown.
        """
        path = pretrained_model_name_or_path
        if isinstance(config, PreTrainedConfig):
            config = BitNetConfig.from_hf(config)
        if path is not None and os.path.isdir(path):
            check_folder(os.path.join(path, kwargs.get("subfolder") or ""))
        kwargs["use_safetensors"] = True  # pickled weights can run code: never read
        try:
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or truncated ({error})") from error

    @staticmethod
    def _load_pretrained_model(
        model: Any,
        state_dict: Any,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        is_adapter = expected_keys is not None
        if is_adapter:
            check_suffixes(checkpoint_files or [])
        elif checkpoint_files and load_config.hf_quantizer is None:
            # transformers fills what a checkpoint lacks with random numbers; a quantiser has
            # checked its checkpoint already
            check_checkpoint(model, checkpoint_files)
        return hf.BitNetPreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )

    # transformers refuses these casts for quantised models; ours keep their codes and scales
    def half(self) -> Any:
        """Cast what is not quantised to float16."""
        return nn.Module.half(self)

    def float(self) -> Any:
        """Cast what is not quantised to float32."""
        return nn.Module.float(self)


class BitNetModel(_TernaryModel, hf.BitNetModel):
    """The BitNet decoder without a language-model head."""


class BitNetForCausalLM(_TernaryModel, hf.BitNetForCausalLM):
    """BitNet with a language-model head: ``from_pretrained``, ``generate``, ``Trainer``."""
