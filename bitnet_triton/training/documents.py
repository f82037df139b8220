"""What a model is trained on: documents of tokens, labels, and how long their prompts are.

Each is ``{"input_ids", "labels", "prompt_len"}``, as ``PackingCollator`` reads them. A text that is
read rather than answered is all prompt: its labels count, and its tokens attend as a prompt's do.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from bitnet_triton.training.answers import ask
from bitnet_triton.training.packing import IGNORED
from bitnet_triton.training.tasks import TASKS, Prompt, TextTokens, Turn, draw_prompt

_TRIES = 100  # prompts in a row that give nothing, before it is said that none will

Document = dict[str, Any]
# What a model said right, or None where it said nothing right
Teacher = Callable[[list[str], Prompt, str], "Prompt | None"]


def draw_documents(
    tokens: TextTokens,
    *,
    total: int,
    length: int,
    text: float,
    questions: Sequence[str],
    seed: int | str,
    teacher: Teacher | None = None,
) -> Iterator[Document]:
    """Draw documents of the retrieval tasks and of text; equal arguments make equal ones.

    Args:
        tokens: of the model.
        total: tokens of all documents together, at most.
        length: tokens of a document; of some that a teacher has cut, less.
        text: share of the tokens that is text alone.
        questions: "prompt" or "decode", the phase that questions belong to, in turns.
        seed: of all of them.
        teacher: keeps the answers that it says itself. Default: all answers as they were drawn.

    Raises:
        ValueError: ``length`` has no room for any task, or a teacher answers none right.
    """
    used, read = 0, 0
    number, missed = 0, 0
    while used + length <= total:
        rng = random.Random(f"documents:{seed}:{number}")
        number += 1
        if read + length <= text * (used + length):
            document = text_document(tokens.start + tokens.haystack.stretch(rng, length - 1))
            read += length
        else:
            names, prompt = draw_prompt(rng, tokens, length)
            question = questions[number % len(questions)]
            taught: Prompt | None = prompt
            if teacher is not None and prompt.turns:
                taught = teacher(names, prompt, question)
            if taught is None or not taught.turns:
                missed += 1
                if missed == _TRIES:
                    raise ValueError(_why_nothing(tokens, length, bool(prompt.turns)))
                continue
            document = prompt_document(taught, question)
            missed = 0
        used += len(document["input_ids"])
        yield document


def _why_nothing(tokens: TextTokens, length: int, has_questions: bool) -> str:
    if has_questions:
        return (
            "`self_distill`: expected a model that answers some task right with full attention, "
            f"got none of {_TRIES} prompts right"
        )
    return (
        "`length`: expected room for a task, whose words have up to "
        f"{tokens.per_word} tokens each, got {length}"
    )


def text_document(ids: list[int]) -> Document:
    """Return a document whose tokens are all read and all count."""
    return {"input_ids": ids, "labels": list(ids), "prompt_len": len(ids)}


def prompt_document(prompt: Prompt, question: str) -> Document:
    """Return a document whose answers count."""
    ids, labels = list(prompt.context), [IGNORED] * len(prompt.context)
    for turn in prompt.turns:
        ids += turn.question + turn.answer
        labels += [IGNORED] * len(turn.question) + turn.answer
    asked = len(prompt.turns[0].question) if question == "prompt" else 0
    return {"input_ids": ids, "labels": labels, "prompt_len": len(prompt.context) + asked}


class SelfTeacher:
    """Asks a model, and keeps of a prompt the questions that it has answered right, as it did.

    Args:
        model: with full attention.
        tokens: of the model.

    Attributes:
        asked: questions so far.
        right: how many of them were answered right.
    """

    def __init__(self, model: Any, tokens: TextTokens) -> None:
        self.model, self.tokens = model, tokens
        self.asked = self.right = 0

    def __call__(self, names: list[str], prompt: Prompt, question: str) -> Prompt | None:
        """Return the prompt with the model's own right answers; None: there is none."""
        any_task = TASKS[names[0]]  # scores are taken by the task of each question below
        (answers,) = ask(self.model, self.tokens, any_task, [prompt], question=question)
        turns = []
        for name, turn, answer in zip(names, prompt.turns, answers):
            said = [f" {word}" for word in answer.said.split()]
            self.asked += 1
            if TASKS[name].score(turn.words, said) == 1:
                own = self.tokens.encode(said)
                turns.append(Turn(turn.question, own, tuple(said), turn.depth))
        self.right += len(turns)
        return Prompt(prompt.context, turns, prompt.is_text) if turns else None


@dataclass(frozen=True)
class Line:
    """One document of a user's file.

    Attributes:
        prompt: what is read; all of a text without an answer.
        answer: what follows; None: a text.
    """

    prompt: str
    answer: str | None = None


def read_lines(path: str | Path) -> list[Line]:
    """Read a user's file: JSON lines with ``text``, or ``prompt`` and ``answer``; or plain text.

    Raises:
        ValueError: there is no such file, or a line is not as it should be; the message names it.
    """
    wanted = "`data`: expected `tasks`, a text file or JSON lines"
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{wanted}, got {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{wanted}, got {path}, which is not UTF-8 ({error})") from error
    if path.suffix not in (".jsonl", ".json"):
        found = [Line(content)] if content.strip() else []
    else:
        numbered = enumerate(content.split("\n"), 1)  # strings may hold other ends of lines
        found = [_parse(f"`data`: {path}, line {n}", line) for n, line in numbered if line.strip()]
    if not found:
        raise ValueError(f"{wanted}, got {path}, which has no text")
    return found


def digest_lines(lines: Sequence[Line]) -> str:
    """Return a hash of what a user's file says."""
    said = json.dumps([(line.prompt, line.answer) for line in lines])
    return f"sha256:{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _parse(where: str, line: str) -> Line:
    wanted = "expected an object with `text`, or with `prompt` and `answer`"
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {wanted}, got no JSON ({error})") from error
    names = set(data) if isinstance(data, dict) else set()
    if names not in ({"text"}, {"prompt", "answer"}, {"prompt"}):
        got = ", ".join(map(repr, sorted(names))) or type(data).__name__
        raise ValueError(f"{where}: {wanted}, got {got}")
    if not all(isinstance(value, str) and value.strip() for value in data.values()):
        raise ValueError(f"{where}: expected strings that are not empty")
    if "text" in data:
        return Line(data["text"])
    return Line(data["prompt"], data.get("answer", ""))


def line_documents(
    tokenizer: Any, lines: Sequence[Line], *, length: int, generate: Any = None
) -> Iterator[Document]:
    """Turn a user's lines into documents; texts are cut into pieces of ``length`` tokens.

    Args:
        tokenizer: of the model.
        lines: what was read.
        length: most tokens of a document.
        generate: maps the tokens of a prompt to those of the model's own answer. Default: answers
            are those of the file, each with the end of text behind it. Where the file has an answer
            too, the model's is kept only if it contains that, or is contained in it.

    Raises:
        ValueError: a prompt with its answer is longer than ``length``, or has no answer.
    """
    for number, line in enumerate(lines, 1):
        ids = tokenizer(line.prompt, verbose=False)["input_ids"]
        if line.answer is None:
            starts = range(0, len(ids), length)
            yield from (text_document(ids[start : start + length]) for start in starts)
            continue
        if generate is not None:
            answer = generate(ids)
            if line.answer and not _agree(
                tokenizer.decode(answer, skip_special_tokens=True), line.answer
            ):
                continue
        elif not line.answer:
            raise ValueError(
                f"`data`: document {number}: expected an `answer`, which only `self_distill` "
                "finds by itself"
            )
        else:
            answer = tokenizer(line.answer, add_special_tokens=False)["input_ids"]
            end = tokenizer.eos_token_id
            if end is not None and answer[-1:] != [end]:
                answer = [*answer, end]  # or a model never learns to stop
        if not answer:
            continue
        if len(ids) + len(answer) > length:
            got = len(ids) + len(answer)
            raise ValueError(f"`length`: document {number}: expected at least {got}, got {length}")
        labels = [IGNORED] * len(ids) + answer
        yield {"input_ids": ids + answer, "labels": labels, "prompt_len": len(ids)}


def hold_out(documents: Iterable[Document], tokens: int) -> tuple[list[Document], list[Document]]:
    """Divide documents: so many tokens to train on, and every tenth document to measure on.

    Args:
        documents: in their order; those behind the last that is wanted are not asked for.
        tokens: to train on, at most.
    """
    kept: list[Document] = []
    held_out: list[Document] = []
    used = 0
    for number, document in enumerate(documents):
        if number % 10 == 9:
            held_out.append(document)
            continue
        used += len(document["input_ids"])
        if used > tokens:
            break
        kept.append(document)
    return kept, held_out


def _agree(said: str, answer: str) -> bool:
    said, answer = (" ".join(text.split()).casefold() for text in (said, answer))
    return bool(said) and (answer in said or said in answer)


def greedy_answer(model: Any, ids: Sequence[int], most: int) -> list[int]:
    """Return the tokens that a model answers with, its end of text included."""
    prompt = torch.tensor([list(ids)], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                max_new_tokens=most, do_sample=False, pad_token_id=0,
                eos_token_id=model.generation_config.eos_token_id,
            ),
        )  # fmt: skip
    return out[0, len(ids) :].tolist()


def save_documents(documents: Sequence[Document]) -> str:
    """Return documents as JSON lines."""
    return "".join(json.dumps(document) + "\n" for document in documents)


def load_documents(path: Path) -> list[Document]:
    """Read what ``save_documents`` has written."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
