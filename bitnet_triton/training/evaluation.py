"""``evaluate``: any model, attention, cache and rope setting, on the same tasks and texts."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bitnet_triton.attention import hub
from bitnet_triton.models import BitNetConfig, BitNetForCausalLM
from bitnet_triton.models.extend import FACTOR, METHODS, extend_context
from bitnet_triton.training.answers import QUESTIONS, ask, batches, make_prompts
from bitnet_triton.training.footprint import measure_footprint
from bitnet_triton.training.perplexity import bits, windows
from bitnet_triton.training.results import Report, Store, summarise
from bitnet_triton.training.settings import Setting, make_cache, parse_setting
from bitnet_triton.training.subject import digest, folder_of
from bitnet_triton.training.tasks import TASKS, TextTokens, check_tasks

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_TEXT_TOKENS = 65536  # of held-out text, for each length
_PROBE = 64  # tokens of the short text on which every setting is tried before anything is measured

# setting, what is measured, length, prompts done and prompts in all
Progress = Callable[[str, str, int, int, int], None]


@dataclass(frozen=True)
class Job:
    """What is asked of ``evaluate``, checked."""

    folder: str
    tasks: list[str]
    lengths: list[int]
    depths: list[float]
    settings: list[Setting]
    samples: int
    seed: int
    question: str
    text: bool

    def describe(self) -> dict[str, Any]:
        """Return plain data that names everything a result depends on."""
        return {
            "model": digest(self.folder),
            **{k: v for k, v in dataclasses.asdict(self).items() if k != "folder"},
        }


def evaluate(
    model: BitNetForCausalLM | str | os.PathLike,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (2048,),
    depths: Sequence[float] = DEPTHS,
    settings: Sequence[Setting | str] = ("checkpoint",),
    *,
    samples: int = 50,
    seed: int = 0,
    question: str = "prompt",
    text: bool = True,
    batch_size: int = 8,
    output: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure a model with several settings: accuracy by length and depth, and loss by position.

    All settings get the same prompts. What a mode reads and what a cache holds is counted, not
    taken from a name (``training.footprint``).

    Args:
        model: what ``BitNetForCausalLM.from_pretrained`` takes, the folder of a checkpoint or a
            name on the Hub; or such a model in memory, which stays as it is, with the tokenizer of
            the place it was loaded from.
        tasks: names out of ``training.tasks.TASKS``. Default: all.
        lengths: of the prompts, in tokens, with questions and answers.
        depths: where the fact that is asked for goes, 0 to 1, in turns; empty: anywhere.
        settings: ``Setting``, or its text as ``parse_setting`` reads it.
        samples: prompts of each task and length; the interval of a score goes by them.
        seed: of the prompts.
        question: ``prompt``: questions are read with the prompt, as ``generate`` does; ``decode``:
            the context is read first, and the tokens of questions count as generated, so that
            modes which change only decoding are put to the test.
        text: also measure the loss on held-out text.
        batch_size: prompts that go through the model together.
        output: folder of the results; a run that was killed goes on where it was. Default: none.
        progress: called after each batch.

    Raises:
        TypeError: ``model`` is none that can be measured, or a setting is none.
        ValueError: there is no such model, a task or depth is unknown, a length is beyond the
            model's, or a model refuses a setting; before anything is measured.
    """
    chosen = check_tasks(TASKS if tasks is None else tasks), list(lengths), list(depths)
    wanted = [_setting(setting) for setting in settings]
    _check_values(chosen[2], wanted, samples, question)
    with folder_of(model) as folder:
        job = Job(folder, *chosen, wanted, samples, seed, question, text)
        return _run(job, batch_size, output, progress)


def _run(
    job: Job, batch_size: int, output: str | os.PathLike | None, progress: Progress | None
) -> Report:
    tokens = _check(job)
    store = Store(None if output is None else Path(output), job.describe())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tell = progress or (lambda *args: None)
    for setting in job.settings:
        if all(store.has(**key) for key in _keys(job, setting)):
            continue
        _measure_footprints(load(job.folder, setting).to(device), job, setting, tokens, store)
        loaded = load(job.folder, setting, fuse=True).to(device)
        if job.text:
            _measure_text(loaded, job, setting, tokens, store, tell)
        for task in job.tasks:
            for length in job.lengths:
                _measure_task(loaded, job, setting, (task, length), tokens, store, tell, batch_size)
    return summarise(store)


def load(folder: str, setting: Setting, *, fuse: bool = False) -> Any:
    """Load a model with a setting.

    Raises:
        ValueError: the model cannot be set like that.
    """
    changed: dict[str, Any] = {}
    if setting.attention is not None:
        changed["attention"] = setting.attention
    elif setting.has_memory and BitNetConfig.from_pretrained(folder).attention is None:
        changed["attention"] = "full"  # which tells the memory what keys receive
    elif BitNetConfig.from_pretrained(folder).attention is None:
        changed["attn_implementation"] = (
            hub.NAME
        )  # which is watched; with a plan it is the only one
    rope = dict(setting.rope)
    method = rope.pop("rope_type", None)
    if setting.rope and method not in METHODS:  # nothing is rescaled: other parameters as they are
        known: Any = BitNetConfig.from_pretrained(folder).rope_parameters
        changed["rope_parameters"] = {**known, **setting.rope}
    try:
        model = BitNetForCausalLM.from_pretrained(folder, fuse=fuse, **changed).eval()
        return extend_context(model, method=method, **rope) if method in METHODS else model
    except (TypeError, ValueError) as error:
        raise ValueError(f"`settings`: {setting.name!r}: {error}") from error
    except KeyError as error:  # of transformers' rope functions, which take their fields unchecked
        raise ValueError(f"`settings`: {setting.name!r}: {error} is missing") from error


def _setting(value: Setting | str) -> Setting:
    if isinstance(value, str):
        return parse_setting(value)
    if not isinstance(value, Setting):
        got = type(value).__name__
        raise TypeError(f"`settings`: expected Setting or its text, got {got}")
    return value


def _check(job: Job) -> TextTokens:
    """Refuse what the model cannot be measured with, and try each setting on a short text."""
    config = BitNetConfig.from_pretrained(job.folder)
    for setting in job.settings:
        unsaid = FACTOR if setting.rope.get("rope_type") in METHODS else 1
        longest = config.max_position_embeddings * max(1, setting.rope.get("factor", unsaid))
        for length in job.lengths:
            if length > longest:
                raise ValueError(
                    f"`lengths`: {setting.name!r}: expected at most {longest:g} tokens, got "
                    f"{length}"
                )
    tokens = TextTokens(AutoTokenizer.from_pretrained(job.folder))
    for task in job.tasks:
        for length in job.lengths:  # too short for a task is found out here
            next(make_prompts(task, TASKS[task], tokens, length, 1, job.depths, job.seed))
    for setting in job.settings:
        _try(load(job.folder, setting), setting, tokens)
    return tokens


def _check_values(
    depths: list[float], settings: list[Setting], samples: int, question: str
) -> None:
    """Refuse what no model could be measured with."""
    if question not in QUESTIONS:
        raise ValueError(f"`question`: expected {' or '.join(QUESTIONS)}, got {question!r}")
    if samples < 1:
        raise ValueError(f"`samples`: expected at least 1, got {samples}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"`depths`: expected 0 to 1, got {depth}")
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise ValueError(f"`settings`: expected different names, got {', '.join(names)}")


def _try(model: Any, setting: Setting, tokens: TextTokens) -> None:
    ids = torch.tensor([tokens.start + tokens.haystack.ids[: _PROBE - len(tokens.start)]])
    try:
        measure_footprint(model, ids, make_cache(setting.cache, model, _PROBE))
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"`settings`: {setting.name!r}: {error}") from error


def _keys(job: Job, setting: Setting) -> Iterator[dict[str, Any]]:
    """Yield what tells the last line of each part of a setting."""
    for length in job.lengths:
        yield {"kind": "footprint", "setting": setting.name, "length": length}
        if job.text:
            yield {"kind": "text", "setting": setting.name, "length": length}
        for task in job.tasks:
            yield {
                "kind": "answers", "setting": setting.name, "length": length, "task": task,
                "last": True,
            }  # fmt: skip


def _measure_footprints(
    model: Any, job: Job, setting: Setting, tokens: TextTokens, store: Store
) -> None:
    for length in job.lengths:
        key = {"kind": "footprint", "setting": setting.name, "length": length}
        if store.has(**key):
            continue
        ids = torch.tensor(windows(tokens, length, 1), device=model.device)
        found = measure_footprint(model, ids, make_cache(setting.cache, model, length))
        store.add({**key, "footprint": dataclasses.asdict(found)})


def _measure_text(
    model: Any, job: Job, setting: Setting, tokens: TextTokens, store: Store, tell: Progress
) -> None:
    for length in job.lengths:
        key = {"kind": "text", "setting": setting.name, "length": length}
        if store.has(**key):
            continue
        texts, pieces = windows(tokens, length, max(1, _TEXT_TOKENS // length)), []
        for done, one in enumerate(texts):
            cache = make_cache(setting.cache, model, length) if setting.has_memory else None
            pieces += bits(model, tokens, [one], cache)
            tell(setting.name, "text", length, done + 1, len(texts))
        store.add({**key, "pieces": pieces})


def _measure_task(
    model: Any,
    job: Job,
    setting: Setting,
    cell: tuple[str, int],
    tokens: TextTokens,
    store: Store,
    tell: Progress,
    batch_size: int,
) -> None:
    name, length = cell
    key = {"kind": "answers", "setting": setting.name, "task": name, "length": length}
    if store.has(**key, last=True):
        return
    made = make_prompts(name, TASKS[name], tokens, length, job.samples, job.depths, job.seed)
    prompts, done = list(made), 0
    groups = list(batches(prompts, batch_size))
    for group in groups:
        done += len(group)
        if store.has(**key, first=group[0]):
            continue
        started = time.perf_counter()
        answers = ask(
            model, tokens, TASKS[name], [prompts[index] for index in group],
            question=job.question, cache=setting.cache,
        )  # fmt: skip
        found = [
            {"prompt": index, **dataclasses.asdict(answer)}
            for index, those in zip(group, answers)
            for answer in those
        ]
        store.add(
            {
                **key, "first": group[0], "last": group is groups[-1], "answers": found,
                "seconds": round(time.perf_counter() - started, 3),
            }
        )  # fmt: skip
        tell(setting.name, name, length, done, len(prompts))
