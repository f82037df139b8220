"""``adapt`` and ``pretrain``: documents, a measurement, a training, another measurement.

Sliding window adaptation (SWAA, arXiv:2512.10411) teaches a model that was trained with full
attention to live with another one: fine-tuning under the mask of inference, with adapters on the
projections of queries, keys and values, on answers that the model gave itself while it saw all.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.models import BitNetConfig
from bitnet_triton.training.documents import Document, read_lines
from bitnet_triton.training.evaluation import DEPTHS, evaluate
from bitnet_triton.training.fit import fit
from bitnet_triton.training.gather import Tell, check_room, data_of, gather_documents
from bitnet_triton.training.jobs import Adaptation, Pretraining, TrainingJob
from bitnet_triton.training.options import remember, write_whole
from bitnet_triton.training.settings import Setting, parse_setting
from bitnet_triton.training.subject import digest, folder_of
from bitnet_triton.training.tasks import TASKS
from bitnet_triton.training.trainee import Trainee, new_folder

EASY = tuple(name for name, task in TASKS.items() if not task.hard)


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
        check_room(job, base)
        output = Path(job.output)
        trainee = Trainee(job, base, plan, output)
        trainee.check()
        remember(output, _identity(job, base, plan, data_of(job, lines)))
        trainee.try_step()
        documents, held_out, kept = gather_documents(job, base, lines, output, tell)
        before = _evaluate(job, base, plan, output / "before", tell)
        trained = _train(trainee, documents, held_out, tell)
        after = _evaluate(job, str(output / "model"), plan, output / "after", tell)
    report = {
        "run": dataclasses.asdict(job), "plan": plan.to_config(), "documents": len(documents),
        "answers": kept, "training": trained, "before": before, "after": after,
    }  # fmt: skip
    write_whole(output / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _identity(job: TrainingJob, base: str, plan: AttentionPlan, data: str) -> dict[str, Any]:
    """Return what a result depends on; files are named by what they hold."""
    known = {"model": digest(base), "attention": plan.to_config(), "data": data}
    return {**dataclasses.asdict(job), **known}


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
        trained["merge"] = trainee.save(model, folder, documents, held_out)
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
