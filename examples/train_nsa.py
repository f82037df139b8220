"""Train a small model with Native Sparse Attention from scratch, and print where it looks.

Model, texts and tasks are those of ``train_recall.py`` beside this file; attention has three
branches with keys and values of their own. Afterwards held-out questions are asked, and for each
layer the table says how far its gates are open and how often the block in which the answer stands
is among those that it chose. Twins with full attention, or with the window alone, start from the
same weights and read the same texts.

    python examples/train_nsa.py train --output runs/nsa
    python examples/train_nsa.py look runs/nsa --length 2048
    python examples/train_nsa.py train --output runs/dense --attention full
    python examples/train_nsa.py compare runs/dense runs/nsa
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.kernels import apply_rotary, select_blocks
from bitnet_triton.training.tasks import TASKS, Prompt, TextTokens, build
from bitnet_triton.training.tasks.words import Names

sys.path.insert(0, str(Path(__file__).parent))
import train_recall as recall

LOG_EVERY = 25
TEXT_WEIGHT = 0.1  # of the loss on text beside answers
# for texts of some thousand tokens: a sixteenth of the paper's window, blocks an eighth as long; of
# 8 tokens one key tells too little of each for heads of 64 to find it (docs/sparse-attention.md)
SPARSE = {
    "mode": "native_sparse", "block": 4, "stride": 4, "selection": 8, "selected": 32,
    "initial": 1, "local": 2, "window": 32, "compression": "weights", "shared_kv": False,
}  # fmt: skip

# twins by name: what replaces it, with nothing else changed
ATTENTION: dict[str, dict[str, Any]] = {
    "native_sparse": SPARSE,
    "full": {"mode": "full"},
    "window": {"mode": "sliding", "window": SPARSE["window"]},
}
# the longest text by the share of steps that are done: not by what is right, so that twins read
# the same texts
LENGTHS = ((0.0, 512), (0.15, 1024), (0.35, 2048))

# of all twins
SIZES = recall.PRESETS["cpu"]

# what of the head start a twin needs in another form
STARTS: dict[str, Callable[[bt.BitNetForCausalLM], None]] = {}

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()


def new_model(preset: recall.Preset, attention: str) -> bt.BitNetForCausalLM:
    """Build the recall model with its head start, and give it the attention of a twin."""
    model = recall.new_model(preset)
    recall.head_start(model)
    bt.set_attention(model, ATTENTION[attention])
    if attention in STARTS:
        STARTS[attention](model)
    return model


@torch.no_grad()
def open_gates(model: bt.BitNetForCausalLM) -> None:
    """Let the heads of the head start begin with the branch that has what they look for.

    The token before is in the window, an earlier occurrence of a word among the chosen blocks. A
    softmax over keys without it weighs them all the same, and adds noise of the same size, which
    full attention does not have.
    """
    for number, layer in enumerate(model.model.layers):
        bias = layer.self_attn.native_sparse.gates.bias.unflatten(0, (-1, 3))
        begun = 2 if number == 0 else len(bias) // number  # heads, as in `head_start`
        bias[:begun] = torch.tensor([-4.0, -2.0, 2.0] if number == 0 else [-2.0, 2.0, -2.0])


STARTS["native_sparse"] = open_gates


@dataclass
class Sight:
    """What the last token of a question sees in one layer.

    Attributes:
        layer: its index.
        gates: means over heads: compressed blocks, chosen blocks, the window.
        blocks: those that are chosen, for each head of keys.
    """

    layer: int
    gates: list[float]
    blocks: list[set[int]]


@torch.no_grad()
def look(model: bt.BitNetForCausalLM, ids: list[int]) -> Iterator[Sight]:
    """Yield what the last of ``ids`` sees in each layer, by the public ops."""
    entered: list[dict] = []
    layers = model.model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(kwargs), with_kwargs=True
        )
        for layer in layers
    ]
    model(torch.tensor([ids], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    for index, (layer, inputs) in enumerate(zip(layers, entered)):
        attention, blocks = layer.self_attn, model.attention_plan.mode(index, "prefill").blocks
        part, x = attention.native_sparse, inputs["hidden_states"]
        cos, sin = (angle.to(x.dtype) for angle in inputs["position_embeddings"])
        q = attention.q_proj(x).unflatten(-1, (-1, attention.head_dim))
        keys, _ = part.projected("compressed", x)
        keys = part.keys(keys, block=blocks.block, stride=blocks.stride)
        at = torch.arange(keys.shape[1], device=x.device) * blocks.stride
        chosen: Tensor = select_blocks(
            apply_rotary(q, cos, sin), apply_rotary(keys, cos[:, at], sin[:, at]), blocks=blocks
        )
        gates = part.gates(x)[0, -1].mean(0).tolist()
        heads = [{block for block in head if block >= 0} for head in chosen[0, -1].tolist()]
        yield Sight(index, gates, heads)


def ask(rng: random.Random, tokens: TextTokens, length: int) -> Prompt:
    """Draw a text with one question about a note somewhere in it."""
    draw = TASKS["needles"].draw(rng, Names(rng), length // 2)
    return build([draw], tokens, length, rng)


def picture(blocks: set[int], count: int, fact: int) -> str:
    """Draw the blocks of a text: the one with the answer, those that are read, the others."""
    signs = ["█" if block in blocks else "·" for block in range(count)]
    signs[fact] = "◆" if fact in blocks else "◇"
    return "".join(signs)


def tell(
    model: bt.BitNetForCausalLM, tokens: TextTokens, length: int, questions: int
) -> list[float]:
    """Print a table of gates and of answers among the chosen blocks; return the latter by layer."""
    layers = len(model.model.layers)
    size = model.attention_plan.mode(0, "prefill").blocks.selection
    found, gates = [0.0] * layers, torch.zeros(layers, 3)
    lines: list[str] = []
    for number in range(questions):
        prompt = ask(random.Random(f"look:{number}"), tokens, length)
        turn = prompt.turns[0]
        fact = round(turn.depth * len(prompt.context)) // size
        ids = prompt.context + turn.question
        for sight in look(model, ids):
            hits = [fact in blocks for blocks in sight.blocks]
            found[sight.layer] += sum(hits) / len(hits) / questions
            gates[sight.layer] += torch.tensor(sight.gates) / questions
            if number == 0:
                count = -(-len(ids) // size)
                lines += [
                    f"layer {sight.layer}, head {h}: {picture(blocks, count, fact)}"
                    for h, blocks in enumerate(sight.blocks)
                ]
    table = Table("layer", "compressed", "chosen", "window", "answer among the chosen blocks")
    for layer, share in enumerate(found):
        table.add_row(str(layer), *(f"{g:.2f}" for g in gates[layer]), f"{100 * share:.0f} %")
    console.print(table)
    console.print("The first question, block by block (◆ the answer and read, ◇ not read):")
    for line in lines:
        console.print(line, highlight=False)
    return found


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for model, log and tokenizer.")],
    attention: Annotated[
        str, typer.Option(help="Of the model: a name that the top of the script tells.")
    ] = "native_sparse",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    decay: Annotated[int, typer.Option(help="Last steps, in which the rate falls to 0.")] = 300,
    seed: Annotated[int, typer.Option(help="Of weights and texts.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens of the questions at the end.")] = 1024,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train, save, and print where the model looks.

    Example: python examples/train_nsa.py train --output runs/nsa
    """
    if attention not in ATTENTION:
        raise typer.BadParameter(f"attention: expected one of {', '.join(ATTENTION)}")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    AutoTokenizer.from_pretrained(bt.RECALL_MODEL).save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    tokens = TextTokens(tokenizer, held_out=False)
    model = new_model(SIZES, attention).to("cuda" if torch.cuda.is_available() else "cpu")
    training = recall.Training(model, SIZES.rate, SIZES.start)
    if resume:
        training.load(output)
    log = recall.Log(output / "log.jsonl")
    while training.step < steps:
        training.set_rate(steps, decay)
        training.longest = max(most for at, most in LENGTHS if training.step >= at * steps)
        rng = random.Random(f"{seed}:{training.step}")
        row = recall.make_row(rng, tokens, training.longest, max(training.longest, SIZES.row))
        log.add(len(row.ids), *training.learn(row, TEXT_WEIGHT))
        if training.step % LOG_EVERY == 0 or training.step == steps:
            training.seconds += log.seconds
            log.write(training)
        if training.step % recall.SAVE_EVERY == 0 or training.step == steps:
            training.save(output)
    if attention == "native_sparse":
        tell(model.eval(), TextTokens(tokenizer), length, questions=16)


@app.command("look")
def look_again(
    model: Annotated[Path, typer.Argument(help="What `train` has saved.")],
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 1024,
    questions: Annotated[int, typer.Option(help="How many.")] = 16,
) -> None:
    """Print where a trained model looks.

    Example: python examples/train_nsa.py look runs/nsa --length 2048
    """
    loaded = bt.BitNetForCausalLM.from_pretrained(model, fuse=False)
    tell(loaded, TextTokens(AutoTokenizer.from_pretrained(model)), length, questions)


@dataclass
class Losses:
    """Nats a token of what a model has not seen.

    Attributes:
        answers: their mean over all answers.
        text: over the text between.
        tasks: over the answers of each task.
    """

    answers: float
    text: float
    tasks: dict[str, float]

    @property
    def mixed(self) -> float:
        """What training minimises."""
        return self.answers + TEXT_WEIGHT * self.text


@torch.no_grad()
def held_out(model: bt.BitNetForCausalLM, rows: int, seed: int = 1) -> Losses:
    """Measure the losses on held-out rows as long as those of training."""
    tokens = TextTokens(AutoTokenizer.from_pretrained(model.config.name_or_path))
    longest = LENGTHS[-1][1]
    nats: dict[str, list[float]] = defaultdict(list)
    for number in range(rows):
        row = recall.make_row(random.Random(f"held out:{seed}:{number}"), tokens, longest, longest)
        ids, kind = torch.tensor([row.ids]), torch.tensor(row.kind)[1:]
        logits = model(ids, position_ids=torch.tensor([row.places]), use_cache=False).logits
        lost = torch.nn.functional.cross_entropy(
            logits[0, :-1].float(), ids[0, 1:], reduction="none"
        )
        nats["text"] += lost[kind == 1].tolist()
        for task, at, count in row.answers:
            nats[task] += lost[at - 1 : at - 1 + count].tolist()
    text = mean(nats.pop("text"))
    everything = mean(value for values in nats.values() for value in values)
    return Losses(everything, text, {task: mean(nats[task]) for task in sorted(nats)})


@app.command()
def compare(
    models: Annotated[list[Path], typer.Argument(help="What `train` has saved, dense first.")],
    rows: Annotated[int, typer.Option(help="Held-out rows of 2048 tokens for the losses.")] = 64,
    samples: Annotated[int, typer.Option(help="Prompts of each task.")] = 50,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 2048,
    output: Annotated[Path | None, typer.Option(help="File for the numbers, JSON.")] = None,
) -> None:
    """Print held-out losses, and accuracy by task and depth, of twins.

    The mixed loss is what training minimises: answers, and a tenth of the text.

    Example: python examples/train_nsa.py compare runs/dense runs/nsa runs/window
    """
    tasks = ["passkey", "needle", "needles", "recall", "tracking", "copy"]
    table = Table("", "answers", "text", "mixed", *tasks, title=f"{length} tokens, accuracy in %")
    found: dict[str, Any] = {}
    for folder in models:
        lost = held_out(bt.BitNetForCausalLM.from_pretrained(folder, fuse=False).eval(), rows)
        report = bt.evaluate(
            str(folder.resolve()), tasks, [length], samples=samples, seed=1, text=False
        )
        (scores,) = report.scores.values()
        right = {task: scores[task][length] for task in tasks}
        found[folder.name] = {
            "answers": lost.answers, "text": lost.text, "mixed": lost.mixed,
            "answers_by_task": lost.tasks,
            "accuracy": {task: score.mean for task, score in right.items()},
            "recall_by_depth": right["recall"].by_depth,
        }  # fmt: skip
        losses = (lost.answers, lost.text, lost.mixed)
        shares = (f"{100 * score.mean:.1f}" for score in right.values())
        table.add_row(folder.name, *(f"{loss:.3f}" for loss in losses), *shares)
    console.print(table)
    by_task = Table("", *(name for name in lost.tasks), title="Nats of an answer's token, by task")
    for name, numbers in found.items():
        by_task.add_row(name, *(f"{loss:.3f}" for loss in numbers["answers_by_task"].values()))
    console.print(by_task)
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app()
