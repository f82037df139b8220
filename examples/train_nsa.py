"""Train a small model with Native Sparse Attention from scratch, and print where it looks.

Model, texts and tasks are those of ``train_recall.py`` beside this file; attention has three
branches with keys and values of their own. Afterwards held-out questions are asked, and for each
layer the table says how far its gates are open and how often the block in which the answer stands
is among those that it chose.

    python examples/train_nsa.py train --output runs/nsa
    python examples/train_nsa.py look runs/nsa --length 2048
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
# blocks for texts of some thousand tokens: a sixteenth of the paper's window
SPARSE = {
    "mode": "native_sparse", "block": 16, "stride": 8, "selection": 32, "selected": 8,
    "initial": 1, "local": 2, "window": 32, "compression": "weights", "shared_kv": False,
}  # fmt: skip

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()


def new_model(preset: recall.Preset) -> bt.BitNetForCausalLM:
    """Build the recall model with its head start, and give it sparse attention."""
    model = recall.new_model(preset)
    recall.head_start(model)
    return bt.set_attention(model, SPARSE)


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
    layers, size = len(model.model.layers), SPARSE["selection"]
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
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 600,
    decay: Annotated[int, typer.Option(help="Last steps, in which the rate falls to 0.")] = 150,
    seed: Annotated[int, typer.Option(help="Of weights and texts.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens of the questions at the end.")] = 1024,
) -> None:
    """Train, save, and print where the model looks.

    Example: python examples/train_nsa.py train --output runs/nsa
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    AutoTokenizer.from_pretrained(bt.RECALL_MODEL).save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    tokens, sizes = TextTokens(tokenizer, held_out=False), recall.PRESETS["cpu"]
    model = new_model(sizes).to("cuda" if torch.cuda.is_available() else "cpu")
    training = recall.Training(model, sizes.rate, sizes.start)
    log = recall.Log(output / "log.jsonl")
    while training.step < steps:
        training.set_rate(steps, decay)
        rng = random.Random(f"{seed}:{training.step}")
        row = recall.make_row(rng, tokens, training.longest, max(training.longest, sizes.row))
        log.add(len(row.ids), *training.learn(row, 0.1))
        if training.step % LOG_EVERY == 0 or training.step == steps:
            training.seconds += log.seconds
            training.grow(log.write(training))
    training.save(output)
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


if __name__ == "__main__":
    app()
