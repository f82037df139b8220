"""``adapt`` and ``pretrain``: documents, a measurement, a training, another measurement.

Sliding window adaptation (SWAA, arXiv:2512.10411) teaches a model that was trained with full
attention to live with another one: fine-tuning under the mask of inference, with adapters on the
projections of queries, keys and values, on answers that the model gave itself while it saw all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.models import BitNetConfig, BitNetForCausalLM
from bitnet_triton.training.documents import (
    Document,
    Line,
    SelfTeacher,
    draw_documents,
    greedy_answer,
    hold_out,
    line_documents,
    load_documents,
    read_lines,
    save_documents,
)
from bitnet_triton.training.evaluation import DEPTHS, evaluate
from bitnet_triton.training.fit import fit
from bitnet_triton.training.jobs import Adaptation, Pretraining, TrainingJob
from bitnet_triton.training.options import remember, write_whole
from bitnet_triton.training.settings import Setting, parse_setting
from bitnet_triton.training.subject import digest, folder_of
from bitnet_triton.training.tasks import TASKS, TextTokens
from bitnet_triton.training.trainee import Trainee, device, new_folder

EASY = tuple(name for name, task in TASKS.items() if not task.hard)
_HELD_OUT = 0.1  # of the tokens of a training, so many again to measure the loss on

# What is done, how much of it, of how much, and a loss or NaN
Tell = Callable[[str, int, int, float], None]


def adapt(job: Adaptation, progress: Tell | None = None) -> dict[str, Any]:
    """Adapt a model to another attention, and measure it before and after.

    ``output`` then holds ``model`` (with its plan, its tokenizer, and the adapters beside packed
    weights unless they were merged), ``documents.jsonl`` that it was trained on, and
    ``report.json``, which is returned. The same call goes on where a killed one was, and ends with
    the same bits.

    Args:
        job: what is to be done.
        progress: told how far it is.

    Raises:
        ImportError: adapters need peft, which is not installed.
        ValueError: the model does not attend or train so, the data are not as they should be, or
            ``output`` holds another run. Nothing was trained then.
    """
    return _run(job, progress)


def pretrain(job: Pretraining, progress: Tell | None = None) -> dict[str, Any]:
    """Train all weights of a model by the b1.58 recipe, from random ones or from what it has.

    Leaves what ``adapt`` leaves; ``trained`` are the masters of ``model``.

    Args:
        job: what is to be done.
        progress: told how far it is.

    Raises:
        ValueError: as ``adapt`` does.
    """
    return _run(job, progress)


def _run(job: TrainingJob, progress: Tell | None) -> dict[str, Any]:
    tell = progress or (lambda *args: None)
    lines = [] if job.data == "tasks" else read_lines(job.data)
    with folder_of(job.model) as base:
        plan = _check(job, base)
        output = Path(job.output)
        trainee = Trainee(job, base, plan, output)
        trainee.check()
        remember(output, {**dataclasses.asdict(job), "model": digest(base)})
        trainee.try_step()
        documents, held_out, kept = _documents(job, base, lines, output, tell)
        before = _evaluate(job, base, plan, output / "before", tell)
        trained = _train(trainee, documents, held_out, tell)
        after = _evaluate(job, str(output / "model"), plan, output / "after", tell)
    report = {
        "run": dataclasses.asdict(job), "plan": plan.to_config(), "documents": len(documents),
        "answers": kept, "training": trained, "before": before, "after": after,
    }  # fmt: skip
    write_whole(output / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _check(job: TrainingJob, base: str) -> AttentionPlan:
    """Refuse what this model cannot attend by, or be measured with; return the plan."""
    config = BitNetConfig.from_pretrained(base)
    value: Any = parse_setting(job.attention).attention
    if value is None:
        value = config.attention or "full"
    plan = AttentionPlan.from_config(value, config.num_hidden_layers)
    plan.check_layers(config.num_hidden_layers)
    for name in ("length", "eval_length"):
        if getattr(job, name) > config.max_position_embeddings:
            most = config.max_position_embeddings
            raise ValueError(f"`{name}`: expected up to {most}, got {getattr(job, name)}")
    return plan


def _documents(
    job: TrainingJob, base: str, lines: list[Line], output: Path, tell: Tell
) -> tuple[list[Document], list[Document], dict[str, int] | None]:
    """Make the documents of a run, or read those that it has made before it was killed."""
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


def _make_documents(
    job: TrainingJob, base: str, lines: list[Line], tell: Tell
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


def _held_out(job: TrainingJob) -> int:
    return max(2 * job.length, round(_HELD_OUT * job.tokens))


def _from_lines(
    job: TrainingJob, base: str, lines: list[Line], model: Any
) -> tuple[list[Document], list[Document]]:
    generate, most = None, getattr(job, "answer_tokens", 0)
    if model is not None:

        def generate(ids: Sequence[int]) -> list[int]:
            return greedy_answer(model, ids, most)

    tokenizer = AutoTokenizer.from_pretrained(base)
    made = line_documents(tokenizer, lines, length=job.length, generate=generate)
    return hold_out(made, job.tokens)


def _train(
    trainee: Trainee, documents: list[Document], held_out: list[Document], tell: Tell
) -> dict[str, Any]:
    """Train, and write ``model``; a run that has come so far is not trained again."""
    output = trainee.output
    done = output / "training.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    model = trainee.load()
    schedule = trainee.job.schedule
    errors = None
    if getattr(trainee.job, "transfer", 0):
        errors = trainee.transfer(
            model, documents, lambda step, steps, error: tell("transfer", step, steps, error)
        )
    trained = fit(model, documents, held_out, schedule, output / "checkpoints", tell)
    model.eval()
    with new_folder(output / "model") as folder:
        AutoTokenizer.from_pretrained(trainee.base).save_pretrained(folder)
        trained["what"] = trainee.what
        trained["merge"] = trainee.save(model, folder, documents)
    trained["transfer"] = errors
    write_whole(done, json.dumps(trained, indent=1) + "\n")
    return trained


def _evaluate(
    job: TrainingJob, folder: str, plan: AttentionPlan, output: Path, tell: Tell
) -> dict[str, Any]:
    """Measure a model with the plan; at the start with full attention too."""
    tasks = job.eval_tasks
    if tasks is None:
        tasks = EASY if job.data == "tasks" else ()
    start = output.name == "before"
    if start and getattr(job, "scratch", False):
        return {}  # random weights know nothing
    config, length = BitNetConfig.from_pretrained(folder), job.eval_length
    asked, full = Setting("adapted", plan.to_config()), Setting("full", {"mode": "full"})
    settings = [full, asked] if start else [asked]
    if start and any(mode.module(config) is not None for mode in plan):
        settings = [full]  # what a mode brings along has no weights before it is trained
    found: dict[str, Any] = {setting.name: {"accuracy": {}} for setting in settings}
    for phase in job.questions if tasks else job.questions[:1]:
        with_text = phase == job.questions[0]  # which has no questions
        report = evaluate(
            folder, tasks, [length], DEPTHS, settings, samples=job.eval_samples,
            seed=job.eval_seed, question=phase, text=with_text, batch_size=4,
            output=output / phase,
            progress=lambda setting, what, length, done, total: tell(
                f"{output.name}: {setting} {what}", done, total, float("nan")
            ),
        )  # fmt: skip
        for name, row in found.items():
            row["accuracy"][phase] = {
                task: dataclasses.asdict(report.scores[name][task][length]) for task in tasks
            }
            if with_text:
                row["bits_per_byte"] = report.text[name][length]["bits_per_byte"]
                row["footprint"] = report.footprints[name][length]
    return found
