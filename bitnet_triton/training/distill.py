"""``distill``: a dense model becomes a ternary one that learns from it (arXiv:2510.13998).

1. Norms are put in front of the output projections, and all weights become masters.
2. A short training on text, without a teacher, loosens the weights: ``continued``.
3. The teacher's logits and the relations among its queries, keys and values are learned beside the
   next token: ``trained``, packed as ``model``.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Trainer

from bitnet_triton.models import BitNetForCausalLM, set_attention
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.training.distiller import Distiller, Lesson
from bitnet_triton.training.documents import (
    Document,
    Line,
    digest_lines,
    hold_out,
    line_documents,
    load_documents,
    read_lines,
    save_documents,
)
from bitnet_triton.training.fit import Progress, Schedule, fit
from bitnet_triton.training.jobs import Job
from bitnet_triton.training.options import check_number, remember, write_whole
from bitnet_triton.training.packing import PackingCollator, pack_rows
from bitnet_triton.training.students import load_teacher, make_student, read_dense, read_teacher
from bitnet_triton.training.subject import digest, folder_of
from bitnet_triton.training.trainee import device, new_folder

_MEASURED_ROWS = 8  # from which the sizes of activations are taken
_PARTS = ("documents.jsonl", "continued.jsonl", "held_out.jsonl")


@dataclass(frozen=True)
class Distillation(Job):
    """What is asked of ``distill``.

    Attributes:
        model: the dense model, a folder or a name on the Hub; its tokenizer is beside it.
        data: a text file, or JSON lines with ``text`` or ``prompt`` and ``answer``.
        teacher: another dense model with the same tokens. Default: ``model`` itself.
        corpus: data of the first training. Default: a part of ``data``.
        continued: share of the tokens that the first training takes, without a teacher.
        logits: how much the teacher's logits count beside the next token; 0: not at all.
        relations: how much the relations of its queries, keys and values count.
        temperature: of the logits; above 1, what is unlikely counts more.
        layer: whose relations are learned; negative numbers count from the end.
    """

    model: str = ""
    data: str = ""
    teacher: str | None = None
    corpus: str | None = None
    tokens: int = 1_000_000
    length: int = 512
    rate: float = 1e-3
    continued: float = 0.25
    logits: float = 1.0
    relations: float = 1.0
    temperature: float = 1.0
    layer: int = -1

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            if getattr(self, name) == "":
                wanted = "a dense model" if name == "model" else "a text file or JSON lines"
                raise ValueError(f"`{name}`: expected {wanted}, got none")
        super().__post_init__()
        for name in ("teacher", "corpus"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise TypeError(f"`{name}`: expected a word, got {value!r}")
        check_number("continued", self.continued, least=0, most=1)
        if self.continued == 1:
            raise ValueError(
                "`continued`: expected a share below 1, got 1: nothing is left to teach"
            )
        for name in ("logits", "relations"):
            check_number(name, getattr(self, name), least=0)
        check_number("temperature", self.temperature, above=0)
        check_number("layer", self.layer, whole=True)

    @property
    def schedule(self) -> Schedule:
        """How it is trained: masters in float32, under autocast."""
        return dataclasses.replace(super().schedule, bfloat16=True)


def distill(job: Distillation, progress: Progress | None = None) -> dict[str, Any]:
    """Make a ternary model of a dense one, and let it learn from a dense teacher.

    ``output`` then holds ``model`` (packed, with the tokenizer), ``trained`` (its masters, to train
    on), ``student`` and ``continued`` (masters before either training), the documents, and
    ``report.json``, which is returned: the loss of the teacher and of each of these on documents
    that were held out, and both trainings. The same call goes on where a killed one was, and ends
    with the same bits.

    Args:
        job: what is to be done.
        progress: told how far it is.

    Raises:
        CheckpointError: weights of the model or the teacher are damaged or pickled.
        ValueError: the model has a part that a BitNet layer cannot express, the teacher does not
            fit, the data are not as they should be, or ``output`` holds another run. Nothing was
            trained then.
    """
    tell = progress or (lambda *args: None)
    lines = read_lines(job.data)
    corpus = None if job.corpus is None else read_lines(job.corpus)
    with folder_of(job.model) as base, folder_of(job.teacher or base) as teacher:
        _check(job, base, teacher)
        output = Path(job.output)
        run = {
            **dataclasses.asdict(job), "model": digest(base), "teacher": digest(teacher),
            "data": digest_lines(lines), "corpus": corpus and digest_lines(corpus),
        }  # fmt: skip
        remember(output, run)
        documents, continued, held_out = _documents(job, base, lines, corpus, output)
        dense = _dense_loss(job, teacher, held_out, output)
        _write_student(job, base, [*continued, *documents], output)
        start, first = "student", None
        if continued:
            first = _train(job, "continued", start, continued, held_out, None, tell)
            start = "continued"
        lesson = None
        if job.logits or job.relations:
            lesson = Lesson(
                load_teacher(teacher).to(device()), job.logits, job.relations, job.temperature,
                job.layer,
            )  # fmt: skip
        second = _train(job, "trained", start, documents, held_out, lesson, tell)
    if not (output / "model").exists():
        convert_checkpoint(output / "trained", output / "model", dtype=torch.bfloat16)
    losses = {
        "dense": dense, "student": (first or second)["loss_before"],
        "continued": None if first is None else first["loss_after"],
        "trained": second["loss_after"],
    }  # fmt: skip
    report = {
        "run": dataclasses.asdict(job), "documents": len(continued) + len(documents),
        "held_out": len(held_out), "losses": losses, "continued": first, "training": second,
    }  # fmt: skip
    write_whole(output / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _check(job: Distillation, base: str, teacher: str) -> None:
    """Refuse a model that cannot become ternary, and a teacher that does not fit it."""
    ours = read_dense(base)
    theirs = ours if teacher == base else read_teacher(teacher, base)
    for name, config in (("model", ours), ("teacher", theirs)):
        most = config.max_position_embeddings
        if job.length > most:
            raise ValueError(
                f"`length`: expected up to the {most} tokens of the {name}, got {job.length}"
            )
        layers = config.num_hidden_layers
        if job.relations and not -layers <= job.layer < layers:
            raise ValueError(
                f"`layer`: expected one of the {layers} of the {name}, got {job.layer}"
            )
    heads = [(c.num_attention_heads, c.num_key_value_heads) for c in (ours, theirs)]
    if job.relations and heads[0] != heads[1]:
        raise ValueError(
            "`teacher`: relations are compared head by head: expected heads and key heads "
            f"{heads[0]} as in the model, got {heads[1]}; `relations: 0` leaves them out"
        )


def _documents(
    job: Distillation, base: str, lines: list[Line], corpus: list[Line] | None, output: Path
) -> tuple[list[Document], list[Document], list[Document]]:
    """Return documents of both trainings and those held out; a killed run has written them."""
    paths = [output / name for name in _PARTS]
    if not paths[-1].exists():
        for path, documents in zip(paths, _make_documents(job, base, lines, corpus)):
            write_whole(path, save_documents(documents))
    documents, continued, held_out = (load_documents(path) for path in paths)
    if not documents:
        raise ValueError("`data`: expected documents to train on, got none")
    return documents, continued, held_out


def _make_documents(
    job: Distillation, base: str, lines: list[Line], corpus: list[Line] | None
) -> tuple[list[Document], list[Document], list[Document]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    first = round(job.continued * job.tokens)
    rng = random.Random(f"distill:{job.seed}")
    total = job.tokens if corpus is None else job.tokens - first
    documents, held_out = hold_out(line_documents(tokenizer, lines, length=job.length), total)
    rng.shuffle(documents)
    if corpus is not None:
        made = list(line_documents(tokenizer, corpus, length=job.length))
        rng.shuffle(made)
        return documents, _up_to(first, made), held_out
    # of a file that is shorter than was asked for, the same share
    first = round(job.continued * sum(len(d["input_ids"]) for d in documents))
    continued = _up_to(first, documents)
    return documents[len(continued) :], continued, held_out


def _up_to(tokens: int, documents: Sequence[Document]) -> list[Document]:
    """Return the first documents, with so many tokens at most."""
    kept, used = [], 0
    for document in documents:
        used += len(document["input_ids"])
        if used > tokens:
            break
        kept.append(document)
    return kept


def _rows(job: Distillation, documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Return batches as models of transformers take them."""
    collate = PackingCollator()
    there = device()
    batches = (collate(row) for row in pack_rows(documents, job.schedule.row))
    names = ("input_ids", "position_ids", "labels")
    return [{name: batch[name].to(there) for name in names} for batch in batches]


def _dense_loss(
    job: Distillation, teacher: str, held_out: list[Document], output: Path
) -> float | None:
    """Return the teacher's loss on what is held out, as that of its students is measured."""
    path = output / "dense.json"
    if not path.exists():
        mean = None
        if held_out:
            model = load_teacher(teacher).to(device())
            rows = _rows(job, held_out)
            with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
                losses = [model(**row, use_cache=False).loss.float().item() for row in rows]
            mean = sum(losses) / len(losses)
        write_whole(path, json.dumps(mean) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def _write_student(job: Distillation, base: str, documents: list[Document], output: Path) -> None:
    """Write the ternary model as it is before any training."""
    if (output / "student").exists():
        return
    dense = load_teacher(base, torch.float32).to(device())
    some = [
        {name: value for name, value in row.items() if name != "labels"}
        for row in _rows(job, documents[:_MEASURED_ROWS])
    ]
    _save(make_student(dense, some), base, output / "student")


def _save(model: Any, base: str, target: Path) -> None:
    with new_folder(target) as folder:
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        model.save_pretrained(folder)


def _train(
    job: Distillation,
    name: str,
    start: str,
    documents: list[Document],
    held_out: list[Document],
    lesson: Lesson | None,
    tell: Progress,
) -> dict[str, Any]:
    """Train one stage and write its masters; one that is done is not trained again."""
    output = Path(job.output)
    done = output / f"{name}.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    model = BitNetForCausalLM.from_pretrained(output / start, dtype=torch.float32).to(device())
    set_attention(model, "full")  # ours, which is told where packed documents begin
    make = Trainer if lesson is None else partial(Distiller, lesson=lesson)
    found = fit(
        model, documents, held_out, job.schedule, output / "checkpoints" / name,
        lambda what, step, steps, loss: tell(name, step, steps, loss), make,
    )  # fmt: skip
    model.config.attention = None  # transformers reads the checkpoint without us
    _save(model, str(output / start), output / name)
    write_whole(done, json.dumps(found, indent=1) + "\n")
    return found
