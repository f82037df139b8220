"""transformers' continuous batching with ``attn_implementation="bitnet_triton"``."""

from __future__ import annotations

import copy
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from bitnet_triton.attention import hub
from bitnet_triton.models.choosing import Choices
from bitnet_triton.models.waiting import let_wait

# What the engine has no place for, and what is nothing of it
_REFUSED: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (None, 1, 1.0), "num_beams": (None, 1), "stop_strings": (None, []),
    "max_time": (None,), "penalty_alpha": (None, 0, 0.0), "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,), "constraints": (None,), "force_words_ids": (None,),
}  # fmt: skip


class PagesManager(ContinuousBatchingManager):
    """transformers' manager, which refuses attention functions that it does not know.

    Args:
        model: with our attention.
        generation_config: for what requests leave open.
        config: of the engine.
        workload_hints: as transformers takes them.
    """

    def __init__(
        self, model: Any, generation_config: GenerationConfig, config: Any, workload_hints: Any
    ) -> None:
        # Tokens are chosen by `Choices`; the engine itself takes the largest score
        plain = GenerationConfig(
            max_new_tokens=generation_config.max_new_tokens,
            eos_token_id=generation_config.eos_token_id,
            num_return_sequences=generation_config.num_return_sequences,
            do_sample=False,
        )
        super().__init__(
            model=model,
            generation_config=plain,
            continuous_batching_config=config,
            workload_hints=workload_hints,
        )
        self.logit_processor = Choices(model, generation_config)

    def switch_to_cb_friendly_attn(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Leave a model as it is whose attention reads pages."""
        if model.config._attn_implementation != hub.NAME:
            super().switch_to_cb_friendly_attn(model, *args, **kwargs)

    def join(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the thread to end, which has been told to, and looks at once."""
        self._wake_up_loop.set()
        super().join(*args, **kwargs)

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        let_wait(processor.scheduler)
        return processor


def pages_manager(
    model: Any, generation_config: GenerationConfig | None, config: Any, workload_hints: Any
) -> PagesManager:
    """Return a manager for a model whose attention is ours.

    Every request writes what ``generate`` writes: its logits processors are its own.

    Raises:
        ValueError: the model has an attention plan, or the generation config asks for what the
            engine has no place for: then it would write another text than ``generate``.
    """
    if model.attention_plan is not None:
        raise ValueError("`attention`: continuous batching runs models without an attention plan")
    settings = model.generation_config if generation_config is None else generation_config
    for name, nothing in _REFUSED.items():
        value = getattr(settings, name, None)
        if value is None:  # `generate` takes the model's then
            value = getattr(model.generation_config, name, None)
        if value not in nothing:
            raise ValueError(
                f"`{name}`: transformers' continuous batching drops it, and would write another "
                f"text than `generate`; give a `generation_config` with {name}={nothing[-1]}"
            )
    if settings.eos_token_id is None:
        settings = copy.copy(settings)
        ends = model.generation_config.eos_token_id  # what `generate` takes then
        settings.eos_token_id = -1 if ends is None else ends  # -1: the engine's word for none
    config = ContinuousBatchingConfig() if config is None else config
    if config.return_logprobs:
        raise ValueError("`return_logprobs`: expected False: tokens are chosen by each request")
    return PagesManager(model.eval(), settings, config, workload_hints)
