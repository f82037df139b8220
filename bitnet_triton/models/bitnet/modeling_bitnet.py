"""BitNet models: transformers' own, with the linears of this package."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any, cast

import torch
import transformers.models.bitnet.modeling_bitnet as hf
from safetensors import SafetensorError
from torch import Tensor, is_grad_enabled, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from bitnet_triton.attention import AttentionPlan, hub
from bitnet_triton.errors import CheckpointError
from bitnet_triton.models.bitnet.configuration_bitnet import BitNetConfig
from bitnet_triton.models.bitnet.division import Division
from bitnet_triton.models.bitnet.generation import Generation, keep_steps
from bitnet_triton.models.bitnet.planned import (
    check_attention_implementation,
    check_global_tokens,
    check_no_plan_arguments,
    describe_call,
    prepared_cache,
    read_again,
    span_of,
)
from bitnet_triton.models.bitnet.reversible import make_reversible, run_decoder
from bitnet_triton.models.checkpoint import check_checkpoint, check_folder, check_suffixes
from bitnet_triton.models.fuse import fuse_after_loading, introduce
from bitnet_triton.models.fused.model import FUSED_MODELS, FusedModel
from bitnet_triton.models.head_loss import causal_loss, logits_reader, tell_reader
from bitnet_triton.models.mode_loss import (
    add_mode_loss,
    take_mode_loss,
)
from bitnet_triton.models.overflow import tell_overflow
from bitnet_triton.models.packing import follow_packing
from bitnet_triton.models.planned_attention import give_plan
from bitnet_triton.models.quantizer import as_argument, replace_linears
from bitnet_triton.models.rotary import (
    Frequencies,
    RotaryEmbedding,
    bind,
    check_context_length,
    chosen_frequencies,
)
from bitnet_triton.models.tensor_parallel import HEAD_PLAN, count_beyond, divide
from bitnet_triton.nn import RMSNorm, count_packed, resized_head, use_output_head


def _prepared_plan(config: BitNetConfig) -> AttentionPlan | None:
    """Return the plan of ``config``, if any, and lead transformers' attention layers to it."""
    if config.attention is None and config.cache is None:
        return None
    check_attention_implementation(config._attn_implementation)
    config._attn_implementation = hub.NAME
    layers, attention = config.num_hidden_layers, config.attention or "full"
    plan = AttentionPlan.from_config(attention, layers, config.cache)
    plan.check_layers(config.num_hidden_layers)  # again: keyword arguments come after its check
    return plan


def _make_ours(decoder: Any) -> None:
    """Give the decoder that transformers has built our forward; it is the same otherwise."""
    if type(decoder) is hf.BitNetModel:
        introduce(BitNetModel)
        decoder.__class__ = BitNetModel


class _TernaryModel(Division, hf.BitNetPreTrainedModel):
    """What both classes share: our config, our linears, our checks while loading."""

    config_class = BitNetConfig
    attention_plan: AttentionPlan | None = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config = BitNetConfig.from_hf(config)
        plan = _prepared_plan(config)
        config.check_reversible(plan)  # again: keyword arguments come after its check
        super().__init__(config, *args, **kwargs)
        for name, module in list(self.named_modules()):
            if isinstance(module, hf.BitNetRMSNorm):
                self.set_submodule(name, RMSNorm.from_norm(module))
        self.use_rotary(RotaryEmbedding(config))
        if config.reversible:
            _make_ours(self.base_model)
            make_reversible(self)
        if plan is not None:
            self.use_plan(plan)
        if getattr(config, "quantization_config", None) is not None:
            replace_linears(self, config.quantization_config)
        else:
            use_output_head(self)

    def use_plan(self, plan: AttentionPlan) -> None:
        """Follow ``plan`` from now on, with the parameters that its modes bring."""
        decoder = cast("Any", self.base_model)
        config = self.config
        if self.processes is not None:
            raise ValueError("`attention`: a model that is divided among processes has no plan")
        config.check_reversible(plan)
        give_plan(decoder, plan)  # refuses before anything has changed
        config.attention, config._attn_implementation = plan.to_config(), hub.NAME
        config.cache = None if plan.cache is None else plan.cache.to_data()
        _make_ours(decoder)
        self.attention_plan = decoder.attention_plan = plan

    def use_rotary(self, rotary: RotaryEmbedding) -> None:
        """Turn queries and keys by ``rotary`` from now on."""
        decoder = cast("Any", self.base_model)
        decoder.rotary_emb = rotary
        if rotary.depends_on_length:
            _make_ours(decoder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        fuse: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a BitNet checkpoint: packed, unpacked codes, master weights or dense.

        Args:
            pretrained_model_name_or_path: a folder, or a model on the Hub.
            *model_args: passed to the model.
            config: replaces the checkpoint's own.
            fuse: run inference with packed weights in few kernels, as ``bitnet_triton.fuse`` does;
                a model that cannot be fused says why in the log and runs module by module.
            **kwargs: as for any model of transformers; with ``tp_plan="auto"``, or
                ``distributed_config=DistributedConfig(tp_size=...)``, the model is divided among
                the processes of torchrun (docs/tensor-parallel.md).

        Raises:
            CheckpointError: tensors are missing, superfluous, of a wrong shape or dtype, hold an
                invalid code or scale, a file is damaged or absent, or the weights are pickled;
                nothing is returned then.
            ValueError: the checkpoint belongs to another model type; the attention mode is
                unknown; the model cannot be divided as ``tp_plan`` wants it.
        """
        path = pretrained_model_name_or_path
        if isinstance(config, PreTrainedConfig):
            config = BitNetConfig.from_hf(config)
        if path is not None and os.path.isdir(path):
            check_folder(os.path.join(path, kwargs.get("subfolder") or ""))
        if "quantization_config" in kwargs:
            kwargs["quantization_config"] = as_argument(kwargs["quantization_config"])
        kwargs["use_safetensors"] = True  # pickled weights can run code: never read
        try:
            loaded = super().from_pretrained(path, *model_args, config=config, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or truncated ({error})") from error
        if fuse:
            # with `output_loading_info`, transformers returns a pair
            fuse_after_loading(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

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
        is_divided = model.processes is not None and not is_adapter
        if is_divided:
            state_dict = divide(model, model.processes, checkpoint_files or [])
        loaded = hf.BitNetPreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        if is_divided:
            model.requires_grad_(False)
        return loaded

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Change who computes attention.

        Raises:
            ValueError: ``config.attention`` says how, and ``attn_implementation`` is another way.
        """
        if self.attention_plan is not None:
            check_attention_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        if enable and self.config.reversible:
            raise ValueError(
                "`gradient_checkpointing`: reversible layers keep nothing that checkpoints could "
                "save; expected a model without `reversible`"
            )
        super()._set_gradient_checkpointing(enable, *args, **kwargs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters, and the weights that are packed, each of them, in all processes."""
        counted = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return counted
        return counted + count_packed(self) + count_beyond(self)

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args: Any, **kwargs: Any) -> nn.Linear:
        new = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        return resized_head(old_lm_head, new)

    # transformers refuses these casts for quantised models; ours keep their codes and scales
    def half(self) -> Any:
        """Cast what is not quantised to float16."""
        return nn.Module.half(self)

    def float(self) -> Any:
        """Cast what is not quantised to float32."""
        return nn.Module.float(self)


class BitNetModel(_TernaryModel, hf.BitNetModel):
    """The BitNet decoder without a language-model head."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prompt_len: int | Tensor | None = None,
        global_tokens: Tensor | None = None,
        context_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Map ids [B T] or embeddings [B T D] to hidden states [B T D].

        Args:
            input_ids: int64 [B T].
            attention_mask: [B T], columns in the cache included; 0 for padding.
            position_ids: int64 [B T] or [1 T]. Where they start again another text begins, which
                sees nothing of those before; such calls have no cache.
            past_key_values: a cache. Default: with ``use_cache`` one that keeps what
                ``config.attention`` can still see.
            inputs_embeds: [B T D], instead of ids.
            use_cache: whether to return a cache. Default: ``config.use_cache``.
            prompt_len: columns of the prompt, padding included, a number or integers [B],
                or [S] for packed sequences: tokens from there on count as generated. Default: all
                tokens of the call are a prompt's.
            global_tokens: bool [B T], columns that see and are seen by everything, for attention
                "longformer" with ``global_mask``.
            context_length: for rope types that choose their frequencies by the length of a text:
                tokens that it will have in the end, padding not counted, a number or integers [B].
                The first call with a cache decides. Default: the tokens of the call.
            **kwargs: as for any model of transformers.

        Raises:
            ValueError: ``prompt_len`` or ``global_tokens`` without ``config.attention``,
                ``context_length`` for a rope type that does not depend on it, or one of a wrong
                shape; a cache whose keys were rotated otherwise; an argument that the attention
                mode cannot follow; positions that start again beside a cache, or behind padding.
        """
        x = inputs_embeds if input_ids is None else input_ids
        attention_mask, use_cache = follow_packing(
            attention_mask, position_ids, past_key_values, use_cache
        )
        past_key_values = prepared_cache(self, past_key_values, use_cache)
        rotary = cast("RotaryEmbedding", self.rotary_emb)
        bind(rotary, past_key_values)
        check_context_length(context_length, rotary)
        frequencies: Frequencies | None = None
        if x is not None and rotary.depends_on_length:
            if kwargs.get("cache") is not None:
                frequencies = rotary.choose_for_pages()
            else:
                frequencies = chosen_frequencies(
                    rotary, past_key_values, x, attention_mask, position_ids, context_length,
                    span=span_of(self.attention_plan, str(rotary.rope_type)),
                )  # fmt: skip
        if self.attention_plan is None:
            check_no_plan_arguments(prompt_len=prompt_len, global_tokens=global_tokens)
        elif x is not None and kwargs.get("cache") is None:  # the engine describes its own calls
            check_global_tokens(global_tokens, self.attention_plan)
            attention_mask, position_ids, more = describe_call(
                self, x, attention_mask, position_ids, past_key_values,
                prompt_len=prompt_len, is_answer=kwargs.pop("is_answer", None),
                chosen=frequencies,
            )  # fmt: skip
            kwargs |= {"global_tokens": global_tokens, **more}
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        with nullcontext() if frequencies is None else frequencies.in_use(rotary):
            if self.config.reversible:
                return run_decoder(self, **call)
            outputs = super().forward(past_key_values=past_key_values, use_cache=use_cache, **call)
        read_again(self, past_key_values, input_ids)
        return outputs


class FusedPlannedModel(FusedModel, BitNetModel):  # type: ignore[misc]  # one more argument
    """``BitNetModel`` after ``fuse``."""

    kind = "BitNetModel"


FUSED_MODELS[BitNetModel] = FusedPlannedModel


# Stands for the mask of a call of continuous batching, which describes its texts itself: whoever
# meets a mask with four dimensions looks for no texts in the positions
_OF_ENGINE = torch.empty(1, 1, 0, 0)


def _check_skipping(labels: Tensor | None, logits_to_keep: int | Tensor) -> None:
    """Raise where a call without logits would return nothing, or is told which to return."""
    if labels is None:
        raise ValueError("`skip_logits`: expected `labels` to return a loss of, got None")
    if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
        raise ValueError("`logits_to_keep`: expected 0 beside `skip_logits`")


class BitNetForCausalLM(_TernaryModel, Generation, hf.BitNetForCausalLM):
    """BitNet with a language-model head: ``from_pretrained``, ``generate``, ``Trainer``.

    Attributes:
        mode_loss: what the modes of the attention layers added to the loss of the last call in
            training, without its gradient; None: nothing. A call without labels has no loss to add
            it to: ``take_mode_loss`` gives it for a loss of your own.
    """

    mode_loss: Tensor | None = None
    _tp_plan = HEAD_PLAN  # type: ignore[assignment]  # transformers has none for BitNet

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_len: int | Tensor | None = None,
        global_tokens: Tensor | None = None,
        context_length: int | Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Map ids [B T] to logits [B T vocabulary].

        Args:
            input_ids: int64 [B T].
            attention_mask: as for ``BitNetModel``, and so are the arguments not listed here.
            position_ids: int64 [B T] or [1 T].
            past_key_values: a cache.
            inputs_embeds: [B T D].
            labels: int64 [B T], -100 for tokens without a loss. If ``config.attention`` treats
                generated tokens otherwise, the first label ends the prompt of its row, or
                of its packed sequence.
            use_cache: whether to return a cache.
            logits_to_keep: how many of the last logits to compute, or which; 0: all.
            prompt_len: columns of the prompt. Default: by ``labels``.
            global_tokens: bool [B T].
            context_length: tokens that a text will have in the end; ``generate`` knows them.
            skip_logits: return the loss of ``labels`` and no logits (``outputs.logits`` is None):
                those of some tokens are there at a time (docs/training.md). Default: all logits.
            **kwargs: as for any model of transformers.

        Raises:
            ValueError: as ``BitNetModel`` does; ``skip_logits`` without ``labels``, or beside
                ``logits_to_keep``.
        """
        if skip_logits:
            _check_skipping(labels, logits_to_keep)
        plan, rotary = self.attention_plan, cast("Any", self.base_model).rotary_emb
        check_context_length(context_length, rotary)
        if context_length is not None:
            kwargs["context_length"] = context_length
        if kwargs.get("cache") is not None and attention_mask is None:
            attention_mask = _OF_ENGINE
        if plan is None:
            check_no_plan_arguments(prompt_len=prompt_len, global_tokens=global_tokens)
            attention_mask, use_cache = follow_packing(
                attention_mask, position_ids, past_key_values, use_cache
            )
            past_key_values = prepared_cache(self, past_key_values, use_cache)
            bind(rotary, past_key_values)
        else:
            if plan.has_phases and prompt_len is None and labels is not None:
                kwargs["is_answer"] = labels != -100
            kwargs |= {"prompt_len": prompt_len, "global_tokens": global_tokens}
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            **kwargs,
        }
        if skip_logits:
            outputs = self._lose(**call)
        else:
            outputs = super().forward(logits_to_keep=logits_to_keep, **call)
        if plan is not None and self.training and is_grad_enabled():
            items = kwargs.get("num_items_in_batch")
            outputs, self.mode_loss = add_mode_loss(self.base_model, outputs, labels, items)
        if not skip_logits:
            logits = outputs[0] if labels is None else outputs[1]
            tell_overflow(logits, inputs_embeds if input_ids is None else input_ids)
        return outputs

    @can_return_tuple
    def _lose(self, labels: Tensor, **call: Any) -> CausalLMOutputWithPast:
        """Return what the forward of transformers does, with a loss and without logits."""
        reader = logits_reader(self)
        if reader is not None:
            tell_reader(reader)
            whole = super().forward(labels=labels, return_dict=True, **call)
            return CausalLMOutputWithPast(
                loss=whole.loss,
                past_key_values=whole.past_key_values,
                hidden_states=whole.hidden_states,
                attentions=whole.attentions,
            )
        outputs = self.model(**call)
        hidden, ids = outputs.last_hidden_state, call["input_ids"]
        tell_overflow(hidden, call["inputs_embeds"] if ids is None else ids)
        about = ("num_items_in_batch", "ignore_index", "shift_labels")
        loss = causal_loss(self, hidden, labels, **{n: call[n] for n in about if n in call})
        return CausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def take_mode_loss(self) -> Tensor | None:
        """Return what the modes of the last call in training want added to a loss, once.

        For losses that are computed outside: a call with ``labels`` has added it already.

        Returns:
            A scalar with its gradient; None: there is nothing to add.
        """
        return take_mode_loss(self.base_model)


keep_steps(BitNetForCausalLM)
