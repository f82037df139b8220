"""transformers' continuous batching with ``attn_implementation="bitnet_triton"``."""

from __future__ import annotations

import copy
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from bitnet_triton.attention import hub


class PagesManager(ContinuousBatchingManager):
    """transformers' manager, which refuses attention functions that it does not know."""

    def switch_to_cb_friendly_attn(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Leave a model as it is whose attention reads pages."""
        if model.config._attn_implementation != hub.NAME:
            super().switch_to_cb_friendly_attn(model, *args, **kwargs)


def pages_manager(
    model: Any, generation_config: GenerationConfig | None, config: Any, workload_hints: Any
) -> PagesManager:
    """Return a manager for a model whose attention is ours.

    Raises:
        ValueError: the model has an attention plan, or the generation config asks for what the
            engine drops: then it would write another text than ``generate``.
    """
    if model.attention_plan is not None:
        raise ValueError("`attention`: continuous batching runs models without an attention plan")
    settings = model.generation_config if generation_config is None else generation_config
    for name, nothing in (
        ("repetition_penalty", 1.0), ("min_length", 0), ("min_new_tokens", 0),
        ("no_repeat_ngram_size", 0),
    ):  # fmt: skip
        value = getattr(settings, name, None)
        if value is None:  # `generate` takes the model's then
            value = getattr(model.generation_config, name, None)
        if value not in (None, nothing):
            raise ValueError(
                f"`{name}`: transformers' continuous batching drops it, and would write another "
                f"text than `generate`; give a `generation_config` with {name}={nothing}"
            )
    if settings.eos_token_id is None:
        settings = copy.copy(settings)
        ends = model.generation_config.eos_token_id  # what `generate` takes then
        settings.eos_token_id = -1 if ends is None else ends  # -1: the engine's word for none
    return PagesManager(
        model=model.eval(),
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig() if config is None else config,
        workload_hints=workload_hints,
    )
