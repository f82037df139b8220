"""Recall at eight times the trained length by every rope method, before and after a short training.

The embedded recall model, trained to 4096 tokens, is asked for pairs out of texts of up to 32768,
and reads a held-out text of that length. Then it is trained with each method for a short while: on
rows of 4096 tokens whose positions skip as far as 32768 (arXiv:2309.10400), which costs what short
texts cost, and on ordinary ones, in turns. A run that was killed goes on, cell by cell.

    python examples/longer_recall.py --output runs/longer-recall
"""

from __future__ import annotations

import json
import math
import random
import shlex
import sys
from bisect import bisect_right
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import longer_contexts as longer
import torch
import train_recall as former
import train_tiny as tiny
import typer
from transformers import AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.training.answers import ask, make_prompts
from bitnet_triton.training.longrope import LongRopeJob, search_longrope
from bitnet_triton.training.options import write_whole
from bitnet_triton.training.results import Store
from bitnet_triton.training.subject import digest
from bitnet_triton.training.tasks import TextTokens, draw_prompt
from bitnet_triton.training.tasks.mixture import changed

CONTEXT, TIMES = 4096, 8
QUESTIONS = 64  # about each text
PIECES = 8  # of a text, between which positions skip
PLACES = 16  # of a text, at which the plot shows bits
METHODS = longer.METHODS
DEPTHS = ("0 to 0.2", "0.2 to 0.4", "0.4 to 0.6", "0.6 to 0.8", "0.8 to 1")
WHENS = ("before", "after")
Factors = longer.Factors


def lengths() -> tuple[int, ...]:
    """Return the trained length, half of what is reached, and all of it, in tokens."""
    return CONTEXT, TIMES * CONTEXT // 2, TIMES * CONTEXT


def search(output: Path) -> Factors:
    """Search factors on needles in a text of half of the length that is reached."""
    job = LongRopeJob(
        str(output / "search"), str(bt.RECALL_MODEL), factor=TIMES, length=lengths()[1],
        samples=1, fitness="needles", population=6, generations=2,
    )  # fmt: skip
    return search_longrope(job)["long"]["factors"]


def recall(model: Any, tokens: TextTokens, length: int, number: int) -> list[list[float]]:
    """Return depth and score of each answer to one prompt."""
    task = changed("recall", asked=QUESTIONS)
    *_, prompt = make_prompts("recall", task, tokens, length, number + 1, (), seed=0)
    (answers,) = ask(model, tokens, task, [prompt])
    return [[round(answer.depth, 3), answer.score] for answer in answers]


def skipping(rng: random.Random, length: int, reach: int) -> list[int]:
    """Return positions of a text of ``length`` tokens, the last of them anywhere below ``reach``.

    The text falls into pieces; within one positions go on, between two they skip.
    """
    room = rng.randint(0, reach - length)
    skips = [0, *sorted(rng.randint(0, room) for _ in range(PIECES - 2)), room]
    cuts = sorted(rng.sample(range(1, length), PIECES - 1))
    return [place + skips[bisect_right(cuts, place)] for place in range(length)]


def make_row(step: int, tokens: TextTokens) -> former.Row:
    """Make the row of a step: one text whose positions skip, or ordinary ones packed, in turns."""
    rng = random.Random(f"longer:{step}")
    if step % 2:
        return former.make_row(rng, tokens, CONTEXT, CONTEXT)
    row = former.Row()
    row.add_prompt(*draw_prompt(rng, tokens, CONTEXT))
    row.places = skipping(rng, len(row.ids), TIMES * CONTEXT)
    return row


def train(
    output: Path, method: str, factors: Factors, tokens: TextTokens, count: int, rate: float
) -> Path:
    """Train the recall model with a method on ``count`` tokens; return the packed model."""
    masters, packed = output / f"{method}-masters", output / method
    if packed.exists():
        return packed
    model = longer.extended(tiny.load_masters(Path(bt.RECALL_MODEL)), method, TIMES, factors)
    model.config._attn_implementation = "bitnet_triton"
    training, steps = former.Training(model, rate, CONTEXT), count // CONTEXT
    for step in range(steps):
        for group in training.optimizer.param_groups:
            group["lr"] = rate * min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
            group["weight_decay"] = 0.0  # of masters it makes codes flip
        answer, text, _ = training.learn(make_row(step, tokens), 0.1)
        typer.echo(f"{method}, step {step}: answers {answer:.3f}, text {text:.3f}")
    model.save_pretrained(masters)
    convert_checkpoint(masters, packed, dtype=torch.bfloat16)
    return packed


def summarise(lines: list[dict[str, Any]], sizes: torch.Tensor) -> list[dict[str, Any]]:
    """Return what was measured, a row for each method before and after.

    Args:
        lines: one for each cell.
        sizes: bytes of the stretches of the text.
    """
    rows = []
    for when, method in product(WHENS, METHODS):
        mine = [line for line in lines if (line["when"], line["method"]) == (when, method)]
        answers: dict[int, list[list[float]]] = {length: [] for length in lengths()}
        row: dict[str, Any] = {"when": when, "method": method}
        for line in mine:
            if line["kind"] == "recall":
                answers[line["length"]] += line["found"]
            else:
                (bits,) = torch.tensor(line["found"], dtype=torch.double)
                row[f"bits_per_byte_{line['length']}"] = round((bits.sum() / sizes.sum()).item(), 4)
                by_place = bits.view(PLACES, -1).sum(1) / sizes.view(PLACES, -1).sum(1)
                row[f"by_position_{line['length']}"] = [round(v, 4) for v in by_place.tolist()]
        row["answers"] = {length: len(found) for length, found in answers.items()}
        row["right"] = {
            length: round(sum(score for _, score in found) / len(found), 4)
            for length, found in answers.items()
        }
        row["by_depth"] = by_depth(answers[TIMES * CONTEXT])
        rows.append(row)
    return rows


def by_depth(answers: list[list[float]]) -> list[float | None]:
    """Return the share of right answers for each fifth of a text."""
    fifths = [
        [score for depth, score in answers if min(int(5 * depth), 4) == fifth] for fifth in range(5)
    ]
    return [round(sum(found) / len(found), 4) if found else None for found in fifths]


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the documentation: right answers in %, and bits per byte."""
    long, head = TIMES * CONTEXT, ["training", "method", *map(str, lengths())]
    head += [f"depth {depth}" for depth in DEPTHS]
    head += [f"text, {length}" for length in (CONTEXT, long)]
    text = f"| {' | '.join(head)} |\n|{' --- |' * len(head)}\n"
    for row in rows:
        shares = [*row["right"].values(), *row["by_depth"]]
        values = [row["when"], row["method"]]
        values += ["" if share is None else f"{100 * share:.0f}" for share in shares]
        values += [f"{row[f'bits_per_byte_{length}']:.3f}" for length in (CONTEXT, long)]
        text += f"| {' | '.join(values)} |\n"
    return text


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw recall by depth and bits per byte by position, before and after."""
    from matplotlib.figure import Figure

    long, figure = TIMES * CONTEXT, Figure(figsize=(11, 8))
    axes = figure.subplots(2, 2, sharey="row")
    middles = [long / PLACES * (place + 0.5) for place in range(PLACES)]
    plain = next(row for row in rows if (row["when"], row["method"]) == ("before", "none"))
    for column, when in enumerate(WHENS):
        recalls, texts = axes[:, column]
        texts.plot(middles, plain[f"by_position_{CONTEXT}"], "k:", label=f"windows of {CONTEXT}")
        for row in rows:
            if row["when"] == when:
                style = {"color": f"C{METHODS.index(row['method'])}", "label": row["method"]}
                shares = [math.nan if share is None else 100 * share for share in row["by_depth"]]
                recalls.plot(DEPTHS, shares, "o-", **style)
                texts.plot(middles, row[f"by_position_{long}"], **style)
        recalls.set_title(f"{when} training, {long} tokens", fontsize=10)
        recalls.set(xlabel="where the answer stands", ylabel="right answers in %", ylim=(-3, 103))
        texts.set(xlabel="position", ylabel="bits per byte")
        texts.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(
    output: Annotated[Path, typer.Option(help="Folder of the run and its results.")],
    tokens: Annotated[int, typer.Option(help="Of each training.")] = 163840,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    prompts: Annotated[int, typer.Option(min=1, help="Of each length, for each method.")] = 2,
) -> None:
    """Measure, train, measure; write ``longer-recall.json``, ``.md`` and ``.png``."""
    store = Store(output, {"source": digest(str(bt.RECALL_MODEL)), "tokens": tokens, "rate": rate})
    tokenizer = AutoTokenizer.from_pretrained(bt.RECALL_MODEL)
    known, held_out = (TextTokens(tokenizer, held_out=part) for part in (False, True))
    text = torch.tensor(held_out.haystack.ids[: TIMES * CONTEXT + 1])
    factors = search(output)

    def measure(when: str, method: str, kind: str, length: int, number: int) -> None:
        key = {"when": when, "method": method, "kind": kind, "length": length, "number": number}
        if store.has(**key):
            return
        if when == "before":
            model = longer.load(Path(bt.RECALL_MODEL), method, TIMES, factors)
        else:
            model = longer.load(train(output, method, factors, known, tokens, rate))
        if kind == "text":
            found = longer.text_bits(model, [text], length)
        else:
            found = recall(model, held_out, length, number)
        store.add({**key, "found": found})
        typer.echo(f"{key}: done")

    for number, when, method in product(range(prompts), WHENS, METHODS):
        for length in lengths():
            measure(when, method, "recall", length, number)
        for length in (CONTEXT, TIMES * CONTEXT)[: 2 * (number == 0)]:
            measure(when, method, "text", length, number)

    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sizes = torch.tensor([len(word) for word in words])  # a letter of its alphabet is a byte
    rows = summarise(store.lines, sizes[text[1:]].view(-1, longer.STRETCH).sum(1))
    result = {
        "command": shlex.join(["python", *sys.argv]), **store.run, "prompts": prompts,
        "searched": factors, "rows": rows,
    }  # fmt: skip
    write_whole(output / "longer-recall.json", json.dumps(result, indent=1) + "\n")
    write_whole(output / "longer-recall.md", as_markdown(rows))
    draw(rows, output / "longer-recall.png")
    typer.echo(as_markdown(rows))


if __name__ == "__main__":
    typer.run(main)
