"""What a model says to the prompts of a task, by ``generate``, in batches of equal shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import GenerationConfig

from bitnet_triton.models.rotary import depends_on_length
from bitnet_triton.training.settings import make_cache
from bitnet_triton.training.tasks import Prompt, Task, TextTokens, build
from bitnet_triton.training.tasks.words import Names

QUESTIONS = ("prompt", "decode")


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        depth: where what it needs stands, 0 to 1.
        score: 0 to 1.
        said: what the model said.
    """

    depth: float
    score: float
    said: str


def make_prompts(
    name: str,
    task: Task,
    tokens: TextTokens,
    length: int,
    count: int,
    depths: Sequence[float],
    seed: int,
) -> Iterator[Prompt]:
    """Make prompts; equal arguments make equal ones, whatever else is measured beside.

    Args:
        name: of the task.
        task: draws facts and questions.
        tokens: of the model.
        length: of each, in tokens, with questions and answers.
        count: how many.
        depths: where the fact of the first question goes, one after another; empty: anywhere.
        seed: of all of them.
    """
    for index in range(count):
        rng = Random(f"{name}:{length}:{seed}:{index}")
        room = (length - len(tokens.start)) // tokens.per_word
        draw = task.draw(rng, Names(rng), room)
        depth = depths[index % len(depths)] if depths else None
        yield build([draw], tokens, length, rng, depth)


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[int]]:
    """Yield indices of prompts that go through the model together: no padding is ever needed."""
    groups: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        turns = tuple((len(turn.question), len(turn.answer)) for turn in prompt.turns)
        groups.setdefault((len(prompt.context), turns), []).append(index)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def ask(
    model: Any,
    tokens: TextTokens,
    task: Task,
    prompts: Sequence[Prompt],
    *,
    question: str = "prompt",
    cache: str = "own",
) -> list[list[Answer]]:
    """Ask prompts of equal shape; the answers of each.

    A model that answers a question of several keeps its own answers in the text.

    Args:
        model: a ``BitNetForCausalLM``.
        tokens: of the model.
        task: scores the answers.
        prompts: of one shape, as ``batches`` groups them.
        question: the phase that questions belong to. With ``prompt`` the whole prompt is read in
            one go, as ``generate`` does; with ``decode`` the context is read without knowing the
            question, whose tokens then count as generated.
        cache: see ``Setting``.
    """
    device = model.device
    ids = torch.tensor([prompt.context for prompt in prompts], device=device)
    made = make_cache(cache, model, len(prompts[0]))
    kwargs: dict[str, Any] = {} if made is None else {"past_key_values": made}
    if depends_on_length(model):  # all turns stand in one cache
        kwargs["context_length"] = len(prompts[0])
    if question == "decode":
        with torch.inference_mode():
            output = model(ids, use_cache=True, logits_to_keep=1, **kwargs)
        kwargs["past_key_values"] = output.past_key_values
        if model.attention_plan is not None:
            kwargs["prompt_len"] = ids.shape[1]
    answers: list[list[Answer]] = [[] for _ in prompts]
    for number, turn in enumerate(prompts[0].turns):
        asked = torch.tensor([prompt.turns[number].question for prompt in prompts], device=device)
        ids = torch.cat([ids, asked], 1)
        new = len(turn.answer)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None,
                    return_dict_in_generate=True, use_cache=True,
                ),
                **kwargs,
            )  # fmt: skip
        ids, kwargs["past_key_values"] = output.sequences, output.past_key_values
        for row, prompt in enumerate(prompts):
            now = prompt.turns[number]
            said = tokens.words(ids[row, -new:].tolist())
            answers[row].append(Answer(now.depth, task.score(now.words, said), "".join(said)))
    return answers
