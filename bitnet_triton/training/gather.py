"""The documents of a run: drawn or read once, written to its folder, and read from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bitnet_triton.models import BitNetForCausalLM
from bitnet_triton.training.documents import (
    Document,
    Line,
    SelfTeacher,
    digest_lines,
    draw_documents,
    greedy_answer,
    hold_out,
    line_documents,
    load_documents,
    save_documents,
)
from bitnet_triton.training.jobs import AttentionJob, DocumentJob
from bitnet_triton.training.options import write_whole
from bitnet_triton.training.tasks import TextTokens
from bitnet_triton.training.trainee import device

_HELD_OUT = 0.1  # of the tokens of a training, so many again to measure the loss on

# What is done, how much of it, of how much, and a loss or NaN
Tell = Callable[[str, int, int, float], None]


def gather_documents(
    job: AttentionJob, base: str, lines: list[Line], output: Path, tell: Tell
) -> tuple[list[Document], list[Document], dict[str, int] | None]:
    """Make the documents of a run, or read those that it has made before it was killed.

    Args:
        job: what documents it asks for.
        base: folder of the model.
        lines: of the user's file; none for tasks.
        output: folder of the run.
        tell: told how far it is.

    Returns:
        documents, others to measure the loss on, and how many of the model's own answers were
        asked and right, where it was asked.

    Raises:
        ValueError: there is no document.
    """
    paths = [output / name for name in ("documents.jsonl", "held_out.jsonl", "answers.json")]
    if not paths[-1].exists():
        made, kept = _make_documents(job, base, lines, tell)
        for path, documents in zip(paths, made):
            write_whole(path, save_documents(documents))
        write_whole(paths[-1], json.dumps(kept) + "\n")
    documents, held_out = (load_documents(path) for path in paths[:2])
    if not documents:
        raise ValueError("`data`: expected documents to train on, got none (no answer was right)")
    return documents, held_out, json.loads(paths[-1].read_text(encoding="utf-8"))


def data_of(job: DocumentJob, lines: list[Line]) -> str:
    """Return what names a run's data: a file goes by what it says, wherever it lies."""
    return digest_lines(lines) if lines else job.data


def check_room(job: AttentionJob, base: str) -> None:
    """Raise ValueError, before anything is made, if tasks are asked for and none fits."""
    if job.data != "tasks" or job.text == 1:
        return
    tokens = TextTokens(AutoTokenizer.from_pretrained(base), held_out=False)
    drawn = draw_documents(
        tokens, total=job.length, length=job.length, text=0, questions=job.questions, seed=job.seed
    )
    next(drawn)


def _make_documents(
    job: AttentionJob, base: str, lines: list[Line], tell: Tell
) -> tuple[tuple[list[Document], list[Document]], dict[str, int] | None]:
    self_distill = getattr(job, "self_distill", False)
    model: Any = None
    if self_distill:
        model = BitNetForCausalLM.from_pretrained(base, attention="full").eval().to(device())
    if job.data != "tasks":
        return _from_lines(job, base, lines, model), None
    tokens = TextTokens(AutoTokenizer.from_pretrained(base), held_out=False)
    teacher = SelfTeacher(model, tokens) if self_distill else None
    found: list[list[Document]] = []
    for part, total in (("train", job.tokens), ("held out", _held_out(job))):
        documents, done = [], 0
        drawn = draw_documents(
            tokens, total=total, length=job.length, text=job.text,
            questions=job.questions, seed=f"{part}:{job.seed}", teacher=teacher,
        )  # fmt: skip
        for document in drawn:
            documents.append(document)
            done += len(document["input_ids"])
            tell(f"documents, {part}", done, total, float("nan"))
        found.append(documents)
    kept = None if teacher is None else {"asked": teacher.asked, "right": teacher.right}
    return (found[0], found[1]), kept


def _held_out(job: AttentionJob) -> int:
    return max(2 * job.length, round(_HELD_OUT * job.tokens))


def _from_lines(
    job: AttentionJob, base: str, lines: list[Line], model: Any
) -> tuple[list[Document], list[Document]]:
    generate, most = None, getattr(job, "answer_tokens", 0)
    if model is not None:

        def generate(ids: Sequence[int]) -> list[int]:
            return greedy_answer(model, ids, most)

    tokenizer = AutoTokenizer.from_pretrained(base)
    made = line_documents(tokenizer, lines, length=job.length, generate=generate)
    return hold_out(made, job.tokens)
