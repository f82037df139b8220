"""The next token of each request of continuous batching, chosen as ``generate`` chooses it.

transformers' engine has one list of logits processors for all requests, keeps the three that need
no text, and drops the others with a line in the log. Here every request has the list, and the
draws, that ``generate`` would have for it alone. The engine takes the largest score of a row; a
token that is drawn is handed over as the only one with a score.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)

# What a request may have otherwise than the manager, beside its length and its ends
PER_REQUEST = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size", "min_length", "min_new_tokens",
    "bad_words_ids", "sequence_bias", "suppress_tokens",
)  # fmt: skip
_KEY = "chooser"


class Chooser:
    """How one request chooses: processors, its own draws, and the tokens that it has so far.

    Args:
        model: whose ``generate`` is followed.
        settings: generation config of the manager.
        prompt: the tokens that the request came with.
        wanted: what it has otherwise, of ``PER_REQUEST``, and ``seed``.
    """

    def __init__(
        self, model: Any, settings: GenerationConfig, prompt: list[int], wanted: dict[str, Any]
    ) -> None:
        wanted = dict(wanted)
        seed = wanted.pop("seed", None)
        settings = copy.deepcopy(settings)
        settings.update(**wanted)
        own, _ = model._prepare_generation_config(settings)
        model._prepare_special_tokens(own, True, device=model.device, batch_size=1)
        tokens = torch.tensor([prompt], device=model.device)
        self.draws = bool(own.do_sample)
        self.processors: LogitsProcessorList = model._get_logits_processor(
            own, len(prompt), encoder_input_ids=tokens, device=model.device
        )
        self.generator: torch.Generator | None = None
        if self.draws and seed is not None:
            self.generator = torch.Generator(model.device).manual_seed(seed)
        self._tokens = tokens
        self._length = len(prompt)

    def __deepcopy__(self, memo: dict[int, Any]) -> Chooser:
        """Go on with the same draws: the engine copies a request that it puts off, or forks."""
        twin = copy.copy(self)
        twin._tokens = self._tokens.clone()
        return twin

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken, whatever stands before it."""
        return not self.draws and not self.processors

    def __call__(self, prompt: list[int], written: list[int], scores: Tensor) -> Tensor:
        """Return [1 V] whose largest is the token behind ``prompt`` and ``written``."""
        text = cast("torch.LongTensor", self._text(prompt, written))
        scores = self.processors(text, scores)
        if not self.draws:
            return scores
        token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def _text(self, prompt: list[int], written: list[int]) -> Tensor:
        """Return all tokens [1 T]; only what is new since the last call is copied."""
        length = len(prompt) + len(written)
        if length > self._tokens.shape[1]:
            more = self._tokens.new_empty(1, max(64, self._tokens.shape[1]))
            self._tokens = torch.cat([self._tokens, more], dim=1)
        if length > self._length:
            new = (prompt[self._length :] + written)[-(length - self._length) :]
            self._tokens[0, self._length : length] = torch.tensor(new)
            self._length = length
        return self._tokens[:, :length]


class Choices(ContinuousBatchingLogitsProcessorList):
    """What the engine takes for its list of processors; asks every request's own.

    Args:
        model: whose ``generate`` is followed.
        settings: generation config of the manager, for what a request leaves open.
    """

    def __init__(self, model: Any, settings: GenerationConfig) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self._model, self._settings = model, settings
        self._rows: list[Any] = []
        self._is_plain = False  # whether a request without settings of its own was found to be so

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Refuse what is no setting of a request.

        Raises:
            ValueError: a name is unknown.
        """
        unknown = sorted(kwargs.keys() - {*PER_REQUEST, "seed"})
        if unknown:
            names = ", ".join((*PER_REQUEST, "seed"))
            raise ValueError(f"`{unknown[0]}`: expected a setting of a request ({names})")

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        """Take note of the requests of the coming step that get a token."""
        self._rows = [future.state for future in requests_in_batch if future.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Return scores [R V] whose largest are the tokens chosen."""
        for row, state in enumerate(self._rows):
            if not self._is_plain or state.logit_processor_kwargs:
                self._choose(state, scores[row : row + 1])
        return scores

    def _choose(self, state: Any, scores: Tensor) -> None:
        """Write the scores [1 V] of one request; what fails ends this request alone."""
        try:
            chooser = self._chooser(state)
            if not chooser.is_plain:
                scores.copy_(chooser(state.initial_tokens, state.generated_tokens, scores))
        except (ValueError, TypeError, RuntimeError) as error:
            state.error = str(error)
            state._new_tokens_limit = 0  # the engine ends it in this step

    def _chooser(self, state: Any) -> Chooser:
        wanted = state.logit_processor_kwargs
        if _KEY not in wanted:
            chooser = Chooser(self._model, self._settings, state.initial_tokens, dict(wanted))
            if not wanted and chooser.is_plain:
                self._is_plain = True
            else:
                wanted[_KEY] = chooser
            return chooser
        return wanted[_KEY]
