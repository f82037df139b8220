"""transformers' continuous batching with ``attn_implementation="bitnet_triton"``."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any, cast

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from bitnet_triton.attention import AttentionPlan, hub
from bitnet_triton.kernels import Mask
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

    Raises:
        ValueError: the model's attention is of another kind than the engine's pages serve.
    """

    def __init__(
        self, model: Any, generation_config: GenerationConfig, config: Any, workload_hints: Any
    ) -> None:
        self._plan: AttentionPlan | None = model.attention_plan
        self._masks = masks_of(self._plan, model.config.num_hidden_layers)
        # Tokens are chosen by `Choices`; the engine itself takes the largest score
        plain = GenerationConfig(
            max_new_tokens=generation_config.max_new_tokens,
            eos_token_id=generation_config.eos_token_id,
            do_sample=False,
        )
        # which transformers refuses to build without sampling
        plain.num_return_sequences = generation_config.num_return_sequences
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
        from bitnet_triton.models.window_pages import PlannedPages  # transformers 5.23 or later

        model = self.model
        self.model = cast("Any", _SeenByEngine(model, self._masks))
        try:
            processor = super()._create_batch_processor()
        finally:
            self.model = model
        cache: Any = processor.cache
        if not isinstance(cache, PlannedPages):  # the engine holds it in several places
            cache.__class__ = PlannedPages
            cache.begin(self._plan, self._masks)
            self._use_prefix_sharing = cache.use_prefix_sharing
        let_wait(processor.scheduler)
        return processor


class _SeenByEngine:
    """A model whose config says of each layer whether it has a window, as the engine asks.

    Without a plan our layers see everything, whatever ``config.sliding_window`` says.
    """

    def __init__(self, model: Any, masks: list[Mask]) -> None:
        self._model = model
        self.config = copy.copy(model.config)
        windows = [mask.window for mask in masks]
        self.config.layer_types = [
            "full_attention" if window is None else "sliding_attention" for window in windows
        ]
        self.config.sliding_window = max((window or 0 for window in windows), default=0) or None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def masks_of(plan: AttentionPlan | None, layers: int) -> list[Mask]:
    """Return what each layer of a model sees.

    Raises:
        ValueError: the engine's pages do not serve the plan.
    """
    if plan is None:
        return [Mask()] * layers
    masks = []
    for layer in range(layers):
        mode, later = plan.modes(layer)
        mask = mode.pages_mask
        if mode != later or mask is None:
            names = " and then ".join(dict.fromkeys((mode.name, later.name)))
            raise ValueError(
                "`attention`: continuous batching runs 'full' and 'sliding', the same for prompts "
                f"and generated tokens; layer {layer} has {names!r}"
            )
        masks.append(mask)
    if plan.cache is not None:
        raise ValueError(
            "`cache`: continuous batching keeps all that a layer sees; expected none, got "
            f"{plan.cache.name!r}"
        )
    return masks


def pages_manager(
    model: Any, generation_config: GenerationConfig | None, config: Any, workload_hints: Any
) -> PagesManager:
    """Return a manager for a model whose attention is ours.

    Every request writes what ``generate`` writes: its logits processors are its own.

    Raises:
        ValueError: transformers is older than 5.23; the model has an attention plan of other modes
            than ``full`` and ``sliding``; or the generation config asks for what the engine has no
            place for: then it would write another text than ``generate``.
    """
    if find_spec("transformers.generation.continuous_batching.cache_allocators") is None:
        raise ValueError("continuous batching: expected transformers 5.23 or later")
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
    if config.cpu_offload_space != 0 and model.attention_plan is not None:
        raise ValueError(
            "`cpu_offload_space`: expected 0 beside `attention`: a request of windows that waits "
            f"on the CPU would come back without its pages, got {config.cpu_offload_space}"
        )
    if config.return_logprobs:
        raise ValueError("`return_logprobs`: expected False: tokens are chosen by each request")
    return PagesManager(model.eval(), settings, config, workload_hints)
