"""Which layers have to stay full: a deeper recall model, and plans that choose them differently.

The model of ``train_recall.py`` with eight layers. Its head start goes to layers that the seed
draws, so that no rule such as "every second layer" fits by design. ``compare`` calibrates a model
and measures on other prompts, accuracy and the loss of the answers: calibrated plans beside those
by rule, at equal cost, prompt by prompt.

    python examples/calibrate_layers.py train --output runs/deep --preset deep --steps 1000
    python examples/calibrate_layers.py compare runs/deep --output runs/deep-plans
"""

from __future__ import annotations

import json
import random
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.training import Calibration, Setting, calibrate, evaluate
from bitnet_triton.training.adapt import EASY
from bitnet_triton.training.answers import make_prompts
from bitnet_triton.training.calibration import answer_costs
from bitnet_triton.training.documents import prompt_document
from bitnet_triton.training.evaluation import DEPTHS
from bitnet_triton.training.results import Store
from bitnet_triton.training.tasks import TASKS, TextTokens

sys.path.insert(0, str(Path(__file__).parent))
import train_recall as recipe

recipe.PRESETS["deep"] = recipe.Preset(
    hidden=256, intermediate=512, layers=8, heads=4, row=1024, rate=2e-4, start=512, context=1024,
)  # fmt: skip
_start_in_order = recipe.head_start


def head_start(model: bt.BitNetForCausalLM) -> None:
    """Give the heads of the head start to layers behind the first that the seed draws."""
    layers = model.model.layers
    behind = list(range(1, len(layers)))
    random.Random(f"layers:{torch.initial_seed()}").shuffle(behind)
    model.model.layers = nn.ModuleList([layers[i] for i in [0, *behind]])
    _start_in_order(model)
    model.model.layers = layers


recipe.head_start = head_start


@recipe.app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Folder of a model.")],
    output: Annotated[Path, typer.Option(help="Folder of the calibrations and the table.")],
    counts: Annotated[str, typer.Option(help="Numbers of full layers.")] = "2,4",
    attention: Annotated[str, typer.Option(help="What layers are changed to.")] = (
        "sliding:window=64"
    ),
    length: Annotated[int, typer.Option(help="Of documents and prompts.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Of the documents of a calibration.")] = 20_000,
    samples: Annotated[int, typer.Option(help="Prompts of each task.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the documents.")] = 0,
    judge: Annotated[int, typer.Option(help="Seed of the prompts.")] = 7,
) -> None:
    """Calibrate for each count, measure all plans, write ``table.json`` and ``table.md``."""
    plans: dict[str, dict[str, Any]] = {
        "full attention": {"full": None, "harm": 0.0, "attention": {"mode": "full"}}
    }
    for count in map(int, counts.split(",")):
        job = Calibration(
            output=str(output / f"full-{count}"), model=model, attention=attention, tokens=tokens,
            length=length, question="prompt", full_layers=count, seed=seed,
        )  # fmt: skip
        found = calibrate(job)
        for name, plan in found["plans"].items():
            if plan["full"] in [other["full"] for other in plans.values()]:
                continue
            is_chosen = name == found["chosen"]
            title = f"{count} full: {name}" if plan["full"] else "no layer full"
            plans[title] = {**plan, "count": len(plan["full"]), "chosen": is_chosen}
    settings = [Setting(name, plan["attention"]) for name, plan in plans.items()]
    report = evaluate(
        model, EASY, [length], settings=settings, samples=samples, seed=judge, text=False,
        batch_size=4, output=output / "measured",
    )  # fmt: skip
    losses = measure_losses(model, plans, length, samples, judge, output / "losses")
    right = prompt_scores(output / "measured", length)
    for name, plan in plans.items():
        plan["accuracy"] = {task: report.scores[name][task][length].mean for task in EASY}
        plan["mean"] = sum(plan["accuracy"].values()) / len(EASY)
        plan["loss"] = losses[name].mean().item()
    for name in [name for name, plan in plans.items() if plan.get("chosen")]:
        for rival, other in plans.items():
            if rival != name and other.get("count", plans[name]["count"]) == plans[name]["count"]:
                other.setdefault("calibrated ahead", {})[name] = {
                    "accuracy": interval(right[name] - right[rival]),
                    "loss": interval(losses[name] - losses[rival]),
                }
    run = {"command": shlex.join(["python", *sys.argv]), "plans": plans}
    (output / "table.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(as_markdown(plans), encoding="utf-8")
    typer.echo(as_markdown(plans))


def measure_losses(
    model: str, plans: dict[str, Any], length: int, samples: int, seed: int, output: Path
) -> dict[str, torch.Tensor]:
    """Return the loss of the answers that ``evaluate`` asks for, [samples] means over tasks."""
    chosen = {name: plan["full"] for name, plan in plans.items()}
    run = {"length": length, "samples": samples, "seed": seed, "plans": chosen}
    store = Store(output, run)
    tokens = TextTokens(AutoTokenizer.from_pretrained(model))
    documents = [
        prompt_document(prompt, "prompt")
        for task in EASY
        for prompt in make_prompts(task, TASKS[task], tokens, length, samples, DEPTHS, seed)
    ]
    for name, plan in plans.items():
        if not store.has(plan=name):
            loaded = bt.BitNetForCausalLM.from_pretrained(model, attention=plan["attention"])
            costs = answer_costs(loaded.eval(), documents)
            store.add({"plan": name, "losses": [cost.loss for cost in costs]})
    found = {line["plan"]: torch.tensor(line["losses"]) for line in store.lines}
    return {name: losses.view(len(EASY), samples).mean(0) for name, losses in found.items()}


def prompt_scores(measured: Path, length: int) -> dict[str, torch.Tensor]:
    """Return what ``evaluate`` has found, [samples] means over tasks, by the name of a setting."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for line in (measured / "lines.jsonl").read_text(encoding="utf-8").splitlines():
        answered = json.loads(line)
        if answered["kind"] != "answers" or answered["length"] != length:
            continue
        by_prompt = found.setdefault((answered["setting"], answered["task"]), {})
        for answer in answered["answers"]:
            by_prompt.setdefault(answer["prompt"], []).append(answer["score"])
    names = {setting for setting, _ in found}
    means = {
        key: torch.tensor([sum(scores) / len(scores) for _, scores in sorted(by_prompt.items())])
        for key, by_prompt in found.items()
    }
    return {name: torch.stack([means[name, task] for task in EASY]).mean(0) for name in names}


def interval(differences: torch.Tensor) -> list[float]:
    """Return the mean of paired differences, and the 95 % interval around it."""
    mean, half = differences.mean().item(), 0.0
    if len(differences) > 1:
        half = 1.96 * differences.std().item() / len(differences) ** 0.5
    return [mean, mean - half, mean + half]


def as_markdown(plans: dict[str, dict[str, Any]]) -> str:
    """Return a table of the plans, and one of what the calibrated ones are ahead by."""
    head = ["plan", "full layers", "harm", *EASY, "mean", "loss"]
    text = f"| {' | '.join(head)} |\n|{' --- |' * len(head)}\n"
    for name, plan in plans.items():
        full = "all" if plan["full"] is None else ", ".join(map(str, plan["full"])) or "none"
        scores = [*plan["accuracy"].values(), plan["mean"]]
        cells = [name, full, f"{plan['harm']:.3g}", *(f"{100 * score:.0f}" for score in scores)]
        text += f"| {' | '.join([*cells, format(plan['loss'], '.3f')])} |\n"
    text += "\n| calibrated | beside | accuracy, points | loss, nats |\n| --- | --- | --- | --- |\n"
    for rival, plan in plans.items():
        for name, ahead in plan.get("calibrated ahead", {}).items():
            points = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in ahead["accuracy"]))
            nats = "{:+.3f} ({:+.3f} to {:+.3f})".format(*ahead["loss"])
            text += f"| {name} | {rival} | {points} | {nats} |\n"
    return text


if __name__ == "__main__":
    recipe.app()
