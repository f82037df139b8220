"""What the dense recall model keeps that reads an eighth of a text, unevenly by layer.

Every task, prompt by prompt beside dense attention: ``pooled_blocks`` and ``quest`` as they are,
``indexed_blocks`` with the index of ``convert_sparse.py``, which is trained where the folder has
none. A run that was killed goes on with the same command, and its parts may be measured one by one
before it:

    python examples/converted_table.py --output runs/converted
    python examples/converted_table.py --output runs/converted --only dense --task copy
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from convert_sparse import convert

import bitnet_triton as bt
from bitnet_triton.training import Setting, evaluate
from bitnet_triton.training.tasks import TASKS

# tokens of 64 that layers 0, 1 and 2 read: 8 on average. Layer 1 looks for every place where a
# word stands, layer 2 weighs a few rows; blocks are small, since all look for single tokens
SHARES = (5, 18, 1)
ROWS = ("dense", "pooled_blocks", "indexed_blocks", "quest")


def layers_of(row: str, length: int) -> list[Any]:
    """Return the mode of each layer."""
    if row == "dense":
        return ["full"] * len(SHARES)
    rows = [share * length // 64 for share in SHARES]
    if row == "quest":
        return [{"mode": row, "page": 4, "budget": read // 4 * 4} for read in rows]
    blocks = (4, max(1, length // 1024), 4)  # in layer 1 as many of them in a text of any length
    layers: list[Any] = [
        {"mode": row, "block": block, "selected": read // block}
        for read, block in zip(rows, blocks)
    ]
    if row == "pooled_blocks":
        layers[1] |= {"window": 1, "stride": 1}  # the best key of a block, not its mean
    return layers


def measure(
    row: str, task: str, length: int, samples: int, seed: int, output: Path
) -> dict[str, Any]:
    """Return the score of each prompt, and the rows that a generated token reads and scores."""
    folder = output / row / f"{length}-{task}"
    layers = layers_of(row, length)
    report = evaluate(
        output / "index" if row == "indexed_blocks" else bt.RECALL_MODEL, [task], [length],
        settings=[Setting(row, {"prefill": layers, "decode": layers})], samples=samples,
        seed=seed, text=False, batch_size=4, output=folder,
    )  # fmt: skip
    cost = report.footprints[row][length]
    return {
        "scores": prompt_scores(folder),
        **{key: round(cost[key], 1) for key in ("rows_decode", "scored_decode")},
    }


def prompt_scores(folder: Path) -> list[float]:
    """Return the mean score of each prompt, in % and in order, by the lines of a run."""
    prompts: dict[int, list[float]] = {}
    for line in (folder / "lines.jsonl").read_text(encoding="utf-8").splitlines():
        for answer in json.loads(line).get("answers", []):
            prompts.setdefault(answer["prompt"], []).append(100 * answer["score"])
    return [sum(prompts[number]) / len(prompts[number]) for number in sorted(prompts)]


def compare(scores: list[float], dense: list[float]) -> dict[str, float]:
    """Return the mean, its difference from dense prompt by prompt, and half its 95 % interval.

    The interval counts half a prompt more that is lost, half a one that is won, and one that is
    equal (Agresti and Min, 2005): prompts of which none differs prove no more than they are many.
    """
    pairs = [ours - theirs for ours, theirs in zip(scores, dense, strict=True)]
    count, more = len(pairs), len(pairs) + 2
    variance = (sum(pair**2 for pair in pairs) + 100**2) / more - (sum(pairs) / more) ** 2
    return {
        "mean": round(sum(scores) / count, 1), "minus_dense": round(sum(pairs) / count, 1),
        "half_interval": round(1.96 * math.sqrt(variance / more), 1), "n": count,
    }  # fmt: skip


def as_markdown(table: dict[str, Any], tasks: list[str]) -> str:
    """Return a line for each row and length, with differences from dense."""
    text = f"| | tokens | {' | '.join(tasks)} |\n|{' --- |' * (len(tasks) + 2)}\n"
    for length, rows in table.items():
        for row, found in rows.items():
            cells = [
                f"{one['mean']:g}"
                + (
                    ""
                    if row == "dense"
                    else f" ({one['minus_dense']:+g} ± {one['half_interval']:g})"
                )
                for one in (found["tasks"][task] for task in tasks)
            ]
            text += f"| {row} | {length} | {' | '.join(cells)} |\n"
    return text


def main(
    output: Annotated[Path, typer.Option(help="Folder of the runs, the index and the table.")],
    length: Annotated[list[int] | None, typer.Option(help="Of prompts.  [default: 2048]")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Some.  [default: all]")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows to measure, no table.")] = None,
    samples: Annotated[int, typer.Option(help="Prompts of each task.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 11,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Measure, and write ``table.json`` and ``table.md``."""
    if threads:
        torch.set_num_threads(threads)
    lengths, tasks = length or [2048], task or list(TASKS)
    if "indexed_blocks" in (only or ROWS) and not (output / "index").exists():
        convert(
            output / "index", Path(bt.RECALL_MODEL), block=8, selected=32, length=512,
            dense_rows=36, selected_rows=0, rate=5e-3, seed=0,
        )  # fmt: skip
    table: dict[str, Any] = {}
    for tokens in lengths:
        table[str(tokens)] = rows = {}
        dense: dict[str, list[float]] = {}
        for row in only or ROWS:
            rows[row] = {"layers": layers_of(row, tokens), "tasks": {}}
            for name in tasks:
                found = measure(row, name, tokens, samples, seed, output)
                scores = found.pop("scores")
                if not only:
                    dense.setdefault(name, scores)  # dense comes first
                    rows[row]["tasks"][name] = compare(scores, dense[name])
                    rows[row] |= found
                typer.echo(f"{row} {tokens} {name}: {sum(scores) / len(scores):.1f}")
    if only:
        return
    run = {"command": shlex.join(["python", *sys.argv]), "seed": seed, "table": table}
    (output / "table.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (output / "table.md").write_text(as_markdown(table, tasks), encoding="utf-8")
    typer.echo(as_markdown(table, tasks))


if __name__ == "__main__":
    typer.run(main)
