"""How a BitNet model generates: memories by name, greedy steps of our own, pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from bitnet_triton.attention import AttentionPlan, hub
from bitnet_triton.cache import MEMORIES
from bitnet_triton.models.batching import pages_manager
from bitnet_triton.models.bitnet.greedy import decode_greedily, greedy_objection, tell_once
from bitnet_triton.models.bitnet.planned import (
    check_chunks,
    named_cache,
    replace_dynamic_cache,
)
from bitnet_triton.models.rotary import depends_on_length, plan_length
from bitnet_triton.nn.divided import Processes, share_random_state

# What a step of ``generate`` calls: greedy decoding does without, unless somebody has replaced one
_STEPS: dict[str, Callable[..., Any]] = {}


def keep_steps(model_class: type) -> None:
    """Take note of the methods that a step of ``generate`` calls, as the class has them."""
    for name in (
        "forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation",
    ):  # fmt: skip
        _STEPS[name] = getattr(model_class, name)


class Generation:
    """What ``generate`` of transformers does otherwise; first of the base classes of a model."""

    attention_plan: AttentionPlan | None
    base_model: Any
    config: Any
    device: Any
    processes: Processes | None

    def generate(self, *args: Any, cache_implementation: Any = None, **kwargs: Any) -> Any:
        """Write tokens behind a prompt, as transformers' ``generate`` does.

        Args:
            *args: as transformers takes them.
            cache_implementation: one more kind than transformers has: a memory as ``config.cache``
                takes it, by name or with its settings, for this call.
            **kwargs: as transformers takes them.

        Raises:
            ValueError: the memory does not go with the attention of the model, or a cache is given
                beside it.
        """
        is_ours = isinstance(cache_implementation, Mapping) or cache_implementation in MEMORIES
        if is_ours:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("`cache_implementation`: expected none beside `past_key_values`")
            kwargs["past_key_values"] = named_cache(self, cache_implementation)
        elif cache_implementation is not None:
            kwargs["cache_implementation"] = cache_implementation
        if self.processes is not None:
            share_random_state(self.processes, self.device)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(
        self,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return a manager of transformers' continuous batching; ``generate_batch`` calls it.

        With ``attn_implementation="bitnet_triton"`` the pages of its cache are read in place.

        Raises:
            ValueError: the model is divided among processes.
        """
        if self.processes is not None:
            raise ValueError(
                "continuous batching: expected a whole model, got one divided among processes"
            )
        is_kept = getattr(self, "_cached_continuous_batching_manager", None) is not None
        if self.config._attn_implementation == hub.NAME and not is_kept:
            return pages_manager(
                self, generation_config, continuous_batching_config, workload_hints
            )
        return super().init_continuous_batching(  # type: ignore[misc]
            generation_config, continuous_batching_config, workload_hints, **kwargs
        )

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare the arguments of a step; ``generate`` calls it."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if self.attention_plan is not None and self.attention_plan.counts_positions:
            inputs.pop("position_ids", None)  # they go by what the cache holds
        return inputs

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Write tokens one by one; ``generate`` calls it, for greedy decoding too."""
        objection = greedy_objection(
            self, logits_processor, generation_config, synced_gpus, model_kwargs
        )
        if any(getattr(type(self), name) is not method for name, method in _STEPS.items()):
            objection = "a class has its own step"
        tell_once(objection)
        if objection is None:
            return decode_greedily(
                self, input_ids, stopping_criteria, generation_config, streamer, model_kwargs
            )
        return super()._sample(  # type: ignore[misc]
            cast("Any", input_ids), logits_processor, stopping_criteria, generation_config,
            synced_gpus=synced_gpus, streamer=streamer, **model_kwargs,
        )  # fmt: skip

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        plan, is_given = self.attention_plan, model_kwargs.get("past_key_values") is not None
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        if not is_given:
            replace_dynamic_cache(
                plan, self.config.num_hidden_layers, model_kwargs, generation_config.is_assistant
            )
        cache = model_kwargs.get("past_key_values")
        check_chunks(cache, generation_config.prefill_chunk_size)
        held = getattr(cache, "layers", ())
        wants = any(getattr(layer, "wants_prompt_len", False) for layer in held)
        if (
            plan is not None
            and (plan.wants_prompt_len or wants)
            and (model_kwargs.get("prompt_len") is None)
        ):
            # what comes after this call's input is generated, in a second turn too
            mask = model_kwargs.get("attention_mask")
            columns = generation_config._mask_length if mask is None else mask.shape[1]
            model_kwargs["prompt_len"] = columns
        plan_length(cast("Any", self.base_model).rotary_emb, generation_config, model_kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        unknown: list[str] = []  # arguments that another model does not know
        if assistant is not None and getattr(assistant, "attention_plan", None) is None:
            unknown += ["prompt_len", "global_tokens"]
        if assistant is not None and not depends_on_length(assistant):
            unknown.append("context_length")
        model_kwargs = kwargs["model_kwargs"]
        kwargs["model_kwargs"] = {n: v for n, v in model_kwargs.items() if n not in unknown}
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
