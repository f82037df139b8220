"""Which layers have to stay full: a deeper recall model, and plans that choose them differently.

The model of ``train_recall.py`` with eight layers. Its head start goes to layers that the seed
draws, so that no rule such as "every second layer" fits by design. ``compare`` calibrates a model
and measures accuracy on other prompts: calibrated plans beside those by rule, at equal cost.

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

import bitnet_triton as bt
from bitnet_triton.training import Calibration, Setting, calibrate, evaluate
from bitnet_triton.training.adapt import EASY

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
    samples: Annotated[int, typer.Option(help="Prompts of each task.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the documents.")] = 0,
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
            plans[f"{count} full: {name}" if plan["full"] else "no layer full"] = plan
    settings = [Setting(name, plan["attention"]) for name, plan in plans.items()]
    report = evaluate(
        model, EASY, [length], settings=settings, samples=samples, seed=7, text=False,
        batch_size=4, output=output / "measured",
    )  # fmt: skip
    for name, plan in plans.items():
        plan["accuracy"] = {task: report.scores[name][task][length].mean for task in EASY}
        plan["mean"] = sum(plan["accuracy"].values()) / len(EASY)
    run = {"command": shlex.join(["python", *sys.argv]), "plans": plans}
    (output / "table.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(as_markdown(plans), encoding="utf-8")
    typer.echo(as_markdown(plans))


def as_markdown(plans: dict[str, dict[str, Any]]) -> str:
    """Return the table."""
    head = ["plan", "full layers", "harm", *EASY, "mean"]
    text = f"| {' | '.join(head)} |\n|{' --- |' * len(head)}\n"
    for name, plan in plans.items():
        full = "all" if plan["full"] is None else ", ".join(map(str, plan["full"])) or "none"
        scores = [*plan["accuracy"].values(), plan["mean"]]
        cells = [name, full, f"{plan['harm']:.3g}", *(f"{100 * score:.0f}" for score in scores)]
        text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    recipe.app()
