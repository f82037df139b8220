"""The recipes of sliding window adaptation on the recall model, before and after a short training.

Each recipe is measured as it is, adapted with LoRA on at most one hundredth of the tokens that the
model was trained on, and measured again: a table in the shape of that of arXiv:2512.10411, a plot,
and all figures as JSON. A run that was killed goes on with the same command.

    python examples/swaa_table.py --output runs/swaa
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import bitnet_triton as bt
from bitnet_triton.training import Setting, evaluate, parse_setting
from bitnet_triton.training.adapt import EASY, adapt
from bitnet_triton.training.jobs import Adaptation

PRETRAINED_ON = 2_000_000  # tokens, by the card of the model
PHASES = ("prompt", "decode")


def recipes(window: int, sinks: int) -> dict[str, str]:
    """Return what a row is called, and its attention."""
    w, ws = f"window={window}", f"window={window},sinks={sinks}"
    return {
        "full attention": "full",
        "window alone (naive)": f"sliding:{w}",
        f"first {sinks}": f"sliding:{ws}",
        "full decode": f"swaa:{w},full_decode=true",
        "odd layers full": f"swaa-trained-fast:{w}",
        f"full decode, first {sinks}": f"swaa-untrained-fast:{ws}",
        "full decode, even layers": f'swaa:{w},full_decode=true,full_layers="even"',
        "full decode, odd layers": f"swaa-trained:{w}",
        f"full decode, odd layers, first {sinks}": f"swaa-untrained:{ws}",
    }


def measure(folder: str, settings: list[Setting], samples: int, output: Path) -> dict[str, Any]:
    """Return accuracy by phase and task, and bits per byte, for each setting."""
    found: dict[str, Any] = {setting.name: {} for setting in settings}
    for phase in PHASES:
        report = evaluate(
            folder, EASY, [4096], settings=settings, samples=samples, seed=7, question=phase,
            text=phase == "prompt", batch_size=5, output=output / phase,
        )  # fmt: skip
        for name, row in found.items():
            row[phase] = {task: report.scores[name][task][4096].mean for task in EASY}
            if phase == "prompt":
                row["bits_per_byte"] = report.text[name][4096]["bits_per_byte"]
                row["keys_read"] = report.footprints[name][4096]["rows_prompt"]
    return found


def main(
    output: Annotated[Path, typer.Option(help="Folder of the runs and the table.")],
    window: Annotated[int, typer.Option(help="Keys that a token sees.")] = 64,
    sinks: Annotated[int, typer.Option(help="First tokens of the recipes with some.")] = 16,
    tokens: Annotated[int, typer.Option(help="Of each training.")] = 20_000,
    length: Annotated[int, typer.Option(help="Of a document.")] = 2048,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    samples: Annotated[int, typer.Option(help="Prompts of each task.")] = 30,
    seed: Annotated[int, typer.Option(help="Of documents and training.")] = 0,
) -> None:
    """Measure, adapt, measure; write ``table.json``, ``table.md`` and ``table.png``."""
    rows = recipes(window, sinks)
    base = str(bt.RECALL_MODEL)
    settings = {name: parse_setting(text) for name, text in rows.items()}
    before = measure(base, list(settings.values()), samples, output / "before")
    table: dict[str, Any] = {
        name: {"attention": rows[name], "before": before[setting.name]}
        for name, setting in settings.items()
    }
    for number, (name, setting) in enumerate(settings.items()):
        folder = output / f"recipe-{number}"
        job = Adaptation(
            output=str(folder), model=base, attention=rows[name], tokens=tokens, length=length,
            rate=rate, text=0.0, self_distill=True, seed=seed, eval_tasks=[],
        )  # fmt: skip
        trained = adapt(job)["training"]
        assert trained["tokens"] <= PRETRAINED_ON / 100
        found = measure(str(folder / "model"), [setting], samples, folder / "measured")
        table[name]["after"] = found[setting.name]
        table[name]["training"] = {k: trained[k] for k in ("tokens", "steps", "trained")}
        typer.echo(f"{name}: done")
    command = shlex.join(["python", *sys.argv])
    run = {
        "command": command, "samples": samples, "window": window, "sinks": sinks, "rows": table,
    }  # fmt: skip
    (output / "table.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(as_markdown(table), encoding="utf-8")
    draw(table, output / "table.png")
    typer.echo(as_markdown(table))


def as_markdown(table: dict[str, Any]) -> str:
    """Return a table for each phase of the questions."""
    text = ""
    for phase in PHASES:
        head = ["recipe", *EASY, "mean"] + (["bits per byte"] if phase == "prompt" else [])
        text += f"| {' | '.join(head)} |\n|{' --- |' * len(head)}\n"
        for name, row in table.items():
            cells = [name]
            pairs = [[row[when][phase][task] for when in ("before", "after")] for task in EASY]
            pairs.append([sum(column) / len(EASY) for column in zip(*pairs)])
            cells += [" → ".join(f"{100 * value:.0f}" for value in pair) for pair in pairs]
            if phase == "prompt":
                bits = [row[when]["bits_per_byte"] for when in ("before", "after")]
                cells.append(" → ".join(f"{value:.3f}" for value in bits))
            text += f"| {' | '.join(cells)} |\n"
        text += "\n"
    return text


def draw(table: dict[str, Any], path: Path) -> None:
    """Draw the mean accuracy of each recipe, before and after, for both phases."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 + 0.5 * len(table)))
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"prompt": "questions read with the prompt", "decode": "questions decoded"}
    for axis, phase in zip(axes, PHASES):
        for shift, when, colour in ((0.2, "before", "tab:grey"), (-0.2, "after", "tab:blue")):
            means = [100 * sum(r[when][phase].values()) / len(EASY) for r in table.values()]
            places = [-number + shift for number in range(len(table))]
            axis.barh(places, means, 0.38, color=colour, label=f"{when} training")
        axis.set_title(titles[phase], fontsize=10)
        axis.set_xlabel("mean accuracy of six tasks at 4096 tokens, %", fontsize=9)
        axis.set_xlim(0, 105)
    axes[0].set_yticks([-number for number in range(len(table))], list(table), fontsize=9)
    axes[1].legend(loc="upper right", bbox_to_anchor=(0.98, 0.86), fontsize=8)  # no bars there
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    typer.run(main)
