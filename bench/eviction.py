"""What memories keep that drop tokens, beside kvpress's presses: same weights, prompts and rows.

A prompt is read once by each side. What a policy chooses changes nothing about how the prompt is
read, so that every policy and budget chooses from that one reading; questions and answers are read
from what each has kept. kvpress's hooks run in our model before it is fused, whose linear layers
are the same ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import bitnet_triton as bt
from bench.peers import KVPRESS
from bitnet_triton.attention import hub
from bitnet_triton.cache import Attended, Call, GrowingLayer, begin_call, parse_memory
from bitnet_triton.cache.kvzip import KVzipLayer
from bitnet_triton.training.answers import make_prompts
from bitnet_triton.training.perplexity import windows
from bitnet_triton.training.settings import parse_cache
from bitnet_triton.training.tasks import TASKS, Prompt, TextTokens

TASK_NAMES = ("passkey", "needles", "recall", "tracking", "copy")
QUESTIONS = ("unseen", "seen")
BUDGETS = (0.1, 0.2, 0.5)
# Our settings -> the press beside them; sums with latest tokens are H2O's, kvpress has means alone
PAIRS = {
    "h2o": "ObservedAttentionPress",
    "h2o:average=true,recent=0": "ObservedAttentionPress",
    "snapkv": "SnapKVPress",
    "latest": "StreamingLLMPress",
    "expected_attention": "ExpectedAttentionPress",
}
PRESSES = tuple(dict.fromkeys(PAIRS.values()))
# These read a prompt again, each by itself
TWICE = ("kvzip", "KVzipPress")
_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_TOKENS_AT_A_TIME = 32  # of a text, behind its first half

# A policy, and the share of rows that it keeps
Choice = tuple[str, float]


def kept_rows(tokens: int, share: float) -> int:
    """Return how many rows both sides keep: as kvpress rounds, which is told what goes."""
    removed = 1 - share
    return max(1, int(tokens * (1 - removed)))


class Reading(Protocol):
    """What is left of one prompt, by one policy or several that keep equally many rows.

    Attributes:
        choices: one for each row of ``logits``.
        nbytes: of the keys and values that are kept for each choice.
    """

    choices: list[Choice]
    nbytes: list[int]

    def logits(self, ids: Tensor) -> Tensor:
        """Read further tokens ids [choices T]; return their logits [choices T V]."""


class Side(Protocol):
    """One who reads prompts."""

    def read(self, ids: Tensor) -> Iterator[Reading]:
        """Read a prompt [1 T]; yield what is left of it."""


# --- ours


class _Witness(GrowingLayer):
    """Reads a prompt and lets memories of several kinds choose from it."""

    wants_prompt_len = True

    def __init__(self, choices: Sequence[Choice], tokens: int) -> None:
        super().__init__()
        self._call = Call(0)
        self.memories: dict[Choice, Any] = {
            (text, share): parse_memory(
                {**parse_cache(text), "budget": kept_rows(tokens, share)}
            ).memory()
            for text, share in choices
        }

    def begin(self, call: Call) -> None:
        self._call = call

    def after(self, attended: Attended) -> None:
        assert self.keys is not None
        assert self.values is not None
        for memory in self.memories.values():
            begin_call([memory], self._call)
            memory.update(self.keys, self.values)
            memory.after(attended)


@dataclass
class _Ours:
    model: Any
    cache: Cache
    choices: list[Choice]
    prompt: int

    @property
    def nbytes(self) -> list[int]:
        layers: list[Any] = self.cache.layers
        return [sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)]

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(
            ids, past_key_values=self.cache, use_cache=True, prompt_len=self.prompt
        ).logits


class Ours:
    """Our memories, in the fused model."""

    def __init__(self, folder: Any, dtype: torch.dtype) -> None:
        self.model = bt.BitNetForCausalLM.from_pretrained(
            folder, attention="full", dtype=dtype
        ).eval()

    def read(self, ids: Tensor) -> Iterator[Reading]:
        """Read a prompt [1 T]; yield what each policy has left of it, and the plain cache."""
        T = ids.shape[1]
        layers = range(self.model.config.num_hidden_layers)
        choices = [(name, share) for name in PAIRS for share in BUDGETS]
        witnesses = [_Witness(choices, T) for _ in layers]
        plain = Cache(list(witnesses))
        self.model(ids, past_key_values=plain, use_cache=True, prompt_len=T, logits_to_keep=1)
        for choice in choices:
            memories = [witness.memories.pop(choice) for witness in witnesses]
            yield _Ours(self.model, Cache(memories), [choice], T)
        held = Cache([GrowingLayer() for _ in layers])
        for layer, witness in zip(held.layers, witnesses):
            layer.update(witness.keys, witness.values)
        yield _Ours(self.model, held, [("plain", 1.0)], T)


class OursTwice(Ours):
    """Our memory that has a prompt read again, in the fused model."""

    def read(self, ids: Tensor) -> Iterator[Reading]:
        """Read a prompt [1 T] twice; yield what is left of it, budget by budget."""
        T = ids.shape[1]
        shares = sorted(BUDGETS, reverse=True)
        kind = parse_memory({**parse_cache(TWICE[0]), "budget": kept_rows(T, shares[0])})
        cache = Cache([kind.memory() for _ in range(self.model.config.num_hidden_layers)])
        self.model(ids, past_key_values=cache, use_cache=True, prompt_len=T, logits_to_keep=1)
        for share in shares:
            kept = copy.deepcopy(cache)
            for layer in kept.layers:
                cast("KVzipLayer", layer).shrink(kept_rows(T, share))
            yield _Ours(self.model, kept, [(TWICE[0], share)], T)


# --- kvpress


@dataclass
class _Theirs:
    model: Any
    cache: DynamicCache
    choices: list[Choice]
    seen: int
    nbytes: list[int]

    def logits(self, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        position = torch.arange(self.seen, self.seen + T)[None].expand(len(ids), -1)
        self.seen += T
        return self.model(
            ids, past_key_values=self.cache, use_cache=True, position_ids=position
        ).logits


@dataclass
class _Masked(_Theirs):
    """What kvpress's head-wise methods leave: nothing goes, hidden keys are overwritten."""

    hidden: list[Any]

    def logits(self, ids: Tensor) -> Tensor:
        modules = _attention_modules(self.model)
        for module, indices in zip(modules, self.hidden):
            module.masked_key_indices = indices
        try:
            return super().logits(ids)
        finally:
            for module in modules:
                module.masked_key_indices = None


class Kvpress:
    """kvpress's presses, as hooks in our model before it is fused.

    Raises:
        PeerMissingError: it is not installed.
    """

    def __init__(self, folder: Any, dtype: torch.dtype) -> None:
        kvpress = _import()
        self._presses = {name: getattr(kvpress, name) for name in (*PRESSES, TWICE[1])}
        self.model = bt.BitNetForCausalLM.from_pretrained(
            folder, dtype=dtype, fuse=False, attn_implementation="sdpa"
        ).eval()
        for module in _attention_modules(self.model):
            module.rotary_emb = self.model.model.rotary_emb
            # transformers no longer tells it, and the hooks ask
            module.register_forward_pre_hook(_tell_cache_position, with_kwargs=True)

    def press(self, name: str, share: float) -> Any:
        """Return a press that keeps a share of the rows."""
        return self._presses[name](compression_ratio=1 - share)

    def read(self, ids: Tensor) -> Iterator[Reading]:
        """Read a prompt [1 T]; yield what the presses have left of it."""
        yield from self._scored(ids)
        yield from self._zipped(ids)

    def _scored(self, ids: Tensor) -> Iterator[Reading]:
        left: dict[Choice, DynamicCache] = {}
        presses = {(name, share): self.press(name, share) for share in BUDGETS for name in PRESSES}
        for choice in presses:
            left[choice] = DynamicCache(config=self.model.config)

        def compress(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            hidden = kwargs["hidden_states"]
            for choice, press in presses.items():
                kept = press.compress(module, hidden, layer.keys, layer.values, output[1], kwargs)
                left[choice].layers[module.layer_idx].update(*kept)

        # the probabilities of all queries are what ObservedAttentionPress goes by
        self.model.set_attn_implementation("eager")
        hooks = [
            module.register_forward_hook(compress, with_kwargs=True)
            for module in _attention_modules(self.model)
        ]
        try:
            cache = DynamicCache(config=self.model.config)
            self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
            self.model.set_attn_implementation("sdpa")
        for share in BUDGETS:
            choices = [(name, share) for name in PRESSES]
            caches = [left.pop(choice) for choice in choices]
            nbytes = [sum(t.keys.nbytes + t.values.nbytes for t in c.layers) for c in caches]
            together = DynamicCache(config=self.model.config)
            for index, layer in enumerate(together.layers):
                ours = [c.layers[index] for c in caches]
                layer.update(torch.cat([c.keys for c in ours]), torch.cat([c.values for c in ours]))
            yield _Theirs(self.model, together, choices, ids.shape[1], nbytes)

    def _zipped(self, ids: Tensor) -> Iterator[Reading]:
        """Let KVzip score once, and cut at each budget."""
        press, scores = self.press(TWICE[1], BUDGETS[0]), []
        cut = press.compress_post
        press.compress_post = lambda model: scores.append(press.score_val.clone())
        cache = DynamicCache(config=self.model.config)
        with press(self.model):
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for share in BUDGETS:
            press.score_val, press.compression_ratio = scores[0].clone(), 1 - share
            cut(self.model)
            hidden = [module.masked_key_indices for module in _attention_modules(self.model)]
            copied = copy.deepcopy(cache)
            nbytes = sum(t.keys.nbytes + t.values.nbytes for t in copied.layers)
            choices = [(TWICE[1], share)]
            yield _Masked(self.model, copied, choices, ids.shape[1], [nbytes], hidden)


def _import() -> Any:
    """Import kvpress, which wraps every attention function that it finds, ours among them."""
    KVPRESS.need()
    ours = ALL_ATTENTION_FUNCTIONS[hub.NAME]
    import kvpress

    ALL_ATTENTION_FUNCTIONS[hub.NAME] = ours  # which takes other arguments than it passes
    return kvpress


def _attention_modules(model: Any) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def _tell_cache_position(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    cache = kwargs.get("past_key_values")
    seen = 0 if cache is None else cache.layers[module.layer_idx].get_seq_length()
    new = kwargs["hidden_states"].shape[1]
    return args, {**kwargs, "cache_position": torch.arange(seen, seen + new)}


# --- what is asked


def ask(side: Side, tokens: TextTokens, task: str, prompt: Prompt, question: str) -> dict:
    """Return by policy and share what it holds and how it answers.

    Args:
        side: reads the prompt.
        tokens: of the model.
        task: a name out of ``TASKS``.
        prompt: with its questions.
        question: ``unseen``: all questions come, one after another, behind what was chosen;
            ``seen``: the first one belongs to the prompt, its last token excepted, so that the
            whole answer is read from what was chosen.
    """
    context, turns = list(prompt.context), prompt.turns
    ahead = [turn.question for turn in turns]
    if question == "seen":
        context, ahead, turns = context + ahead[0][:-1], [ahead[0][-1:]], turns[:1]
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for reading in side.read(torch.tensor([context])):
            nbytes = list(reading.nbytes)
            scores: list[list[float]] = [[] for _ in reading.choices]
            answers = torch.zeros(len(scores), 0, dtype=torch.long)
            for turn, asked in zip(turns, ahead):
                # the last token of a former answer was said and not read
                ids = torch.cat([answers[:, -1:], torch.tensor([asked] * len(scores))], 1)
                answers = torch.zeros(len(scores), 0, dtype=torch.long)
                for _ in turn.answer:
                    ids = reading.logits(ids)[:, -1:].argmax(-1)
                    answers = torch.cat([answers, ids], 1)
                for row, said in zip(scores, answers.tolist()):
                    row.append(TASKS[task].score(turn.words, tokens.words(said)))
            for choice, size, row in zip(reading.choices, nbytes, scores):
                found[label(choice)] = {"score": 100 * sum(row) / len(row), "bytes": size}
    return found


def spell(side: Side, tokens: TextTokens, text: list[int]) -> dict:
    """Return by policy and share the bits per byte of a text behind its first half, the prompt."""
    ids, half = torch.tensor([text]), len(text) // 2
    size = len(tokens.tokenizer.decode(text[half + 1 :]).encode())
    found: dict[str, Any] = {}
    with torch.inference_mode():
        for reading in side.read(ids[:, :half]):
            nbytes, rows = list(reading.nbytes), len(reading.choices)
            parts = [
                reading.logits(part.expand(rows, -1))
                for part in ids[:, half:].split(_TOKENS_AT_A_TIME, 1)
            ]
            logits = torch.cat(parts, 1)[:, :-1].float()
            wanted = ids[:, half + 1 :].expand(rows, -1)
            nats = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").sum(1)
            for choice, held, cost in zip(reading.choices, nbytes, nats.tolist()):
                found[label(choice)] = {"score": cost / math.log(2) / size, "bytes": held}
    return found


def label(choice: Choice) -> str:
    """Return what tables and JSON call a policy with its share."""
    return f"{choice[0]} {choice[1]:g}"


def cells(task: str, question: str, length: int, samples: int, seed: int, folder: Any) -> Iterator:
    """Yield the number of each prompt of a task, and a function of a side that measures it."""
    tokens = TextTokens(AutoTokenizer.from_pretrained(folder))
    if task == "text":
        for index, text in enumerate(windows(tokens, length, samples)):
            yield index, lambda side, text=text: spell(side, tokens, text)
        return
    made = make_prompts(task, TASKS[task], tokens, length, samples, _DEPTHS, seed)
    for index, prompt in enumerate(made):
        yield index, lambda side, prompt=prompt: ask(side, tokens, task, prompt, question)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the mean of differences, prompt by prompt, and half their 95 % interval."""
    pairs = [one - other for one, other in zip(ours, theirs, strict=True)]
    count = len(pairs)
    mean = sum(pairs) / count
    variance = sum((pair - mean) ** 2 for pair in pairs) / max(1, count - 1)
    return {"difference": mean, "half_interval": 1.96 * math.sqrt(variance / count), "n": count}


def check_equal(ours: Ours, theirs: Kvpress, ids: Tensor) -> float:
    """Return the largest difference of logits of the two models, without a policy, by their spread.

    Raises:
        AssertionError: single models differ: nothing could be compared.
    """
    with torch.inference_mode():
        one, other = (side.model(ids, use_cache=False).logits.float() for side in (ours, theirs))
    difference = float((one - other).abs().max() / other.std())
    assert (one.argmax(-1) == other.argmax(-1)).float().mean() > 0.99, difference
    return difference
