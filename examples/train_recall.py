"""Train the recall model: a small BitNet b1.58 that finds what stands far back in its context.

It learns the tasks of ``bitnet_triton.training.tasks``, mixed with the documentation of the
standard library. Each row of a step is packed with texts of many lengths; they grow from 512 to
4096 tokens (on a GPU from 1024 to 16384), each time that most answers are right.

    python examples/train_recall.py train --output runs/recall
    bitnet-triton pack runs/recall runs/recall-packed --dtype bfloat16
    bitnet-triton eval --model runs/recall-packed --length 4096
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitnet_triton import BitNetConfig, BitNetForCausalLM
from bitnet_triton.training.tasks import Prompt, TextTokens, draw_dense, draw_prompt
from bitnet_triton.training.tasks.haystack import docstrings
from bitnet_triton.training.tasks.words import MARKERS, NAMES, NUMBERS

VOCABULARY = 1024
END_OF_TEXT = "<|endoftext|>"
# Words with one leading space, single digits, runs of punctuation, line ends with their indent
SPLIT = Regex(r" ?[^\W\d]+|\d| ?[^\s\w]+|\s*\n[ ]*|\s+")
SHORTEST, SHORT = 64, 384  # tokens of a text
WARM_UP, LOG_EVERY, SAVE_EVERY = 100, 25, 100  # steps
GROW_BY, GROW_AT = ("recall", "needles", "passkey", "copy"), 0.87  # texts grow by these answers


@dataclass(frozen=True)
class Preset:
    """Sizes of a model and of its training."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    row: int
    rate: float
    start: int
    context: int


PRESETS = {
    "cpu": Preset(
        hidden=256,
        intermediate=512,
        layers=3,
        heads=4,
        row=2048,
        rate=6e-4,
        start=512,
        context=4096,
    ),
    # for a GPU: eight times the parameters, four times the context; no figure of it is published
    "gpu": Preset(
        hidden=512,
        intermediate=1536,
        layers=6,
        heads=8,
        row=32768,
        rate=6e-4,
        start=1024,
        context=16384,
    ),
}
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()


def _signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).float() * 2 - 1


@torch.no_grad()
def head_start(model: BitNetForCausalLM) -> None:
    """Begin with the two heads that recall needs, instead of waiting for them to form.

    The first layer gets heads that look at the token before, the others induction heads that look
    for the place behind an earlier occurrence of the current token (arXiv:2209.11895). They share
    out the hidden dimensions: ``same`` entries are equal for all tokens, so that a head can attend
    by distance alone; ``token`` says which token it is, ``before`` which one stood before. All
    matrices are ternary from the start, up to their scale; training may change everything.
    """
    config, layers = model.config, model.model.layers
    D, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    same, token, before = slice(0, D // 16), slice(D // 16, 17 * D // 32), slice(17 * D // 32, D)
    width, half = 15 * D // 32, head // 2
    frequency = config.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)
    embedding = model.model.embed_tokens.weight
    embedding.copy_(0.1 * torch.randn_like(embedding))
    embedding[:, same] = 0.1
    embedding[:, before] *= 0.05

    first = layers[0].self_attn
    layers[0].input_layernorm.weight[same] = 13.0
    for start in (0, head):
        heads = slice(start, start + head)
        first.q_proj.weight[heads], first.k_proj.weight[heads] = 0.0, 0.0
        for i in range(half // 4):  # pairs that turn fast, the key one position ahead of the query
            first.q_proj.weight[start + i, same] = 0.12
            for row, part in ((i, frequency[i].cos()), (i + half, frequency[i].sin())):
                first.k_proj.weight[start + row, : round(part.item() * D / 16)] = 0.12
        _pass_on(first, heads, token, before, 0.04)
    first.v_proj.weight[2 * head :], first.o_proj.weight[:, 2 * head :] = 0.0, 0.0

    # pairs that turn less than a third of a circle in the whole context
    slow = [i for i in range(half) if frequency[i] * config.max_position_embeddings < 2]
    for number, layer in enumerate(layers[1:]):
        attention, count = layer.self_attn, config.num_attention_heads // (1 + number)
        layer.input_layernorm.weight.fill_(4.0)
        if number:
            attention.o_proj.weight.mul_(0.1)
        for start in range(0, count * head, head):
            heads = slice(start, start + head)
            attention.q_proj.weight[heads], attention.k_proj.weight[heads] = 0.0, 0.0
            for i in [*slow, *(i + half for i in slow)]:
                match = 0.3 * _signs(width)
                attention.q_proj.weight[start + i, token] = match
                attention.k_proj.weight[start + i, before] = match
            _pass_on(attention, heads, token, token, 0.08)
    for layer in layers:
        layer.mlp.down_proj.weight.mul_(0.1)


def _pass_on(
    attention: torch.nn.Module, heads: slice, source: slice, target: slice, scale: float
) -> None:
    """Let heads write to ``target`` what stands in ``source`` where they look."""
    attention.v_proj.weight[heads], attention.o_proj.weight[:, heads] = 0.0, 0.0
    codes = _signs(heads.stop - heads.start, source.stop - source.start)
    attention.v_proj.weight[heads, source] = 0.1 * codes
    attention.o_proj.weight[target, heads] = scale * codes.T


def train_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose names, numbers and markers are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPLIT, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [*MARKERS, *NAMES, *NUMBERS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(words),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(docstrings(held_out=False), trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def new_model(preset: Preset) -> BitNetForCausalLM:
    """Build the model with random master weights."""
    config = BitNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        max_position_embeddings=preset.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        # half of each head turns less than once in the whole context: it finds words, not places
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attn_implementation="bitnet_triton",
    )
    return BitNetForCausalLM(config)


@dataclass
class Row:
    """Texts of many lengths, packed.

    Attributes:
        ids: tokens.
        places: of each token in its own text; they start at 0 again where a text starts.
        kind: what counts: 0 nothing, 1 text, 2 an answer.
        answers: task, place and length of each answer.
    """

    ids: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    kind: list[int] = field(default_factory=list)
    answers: list[tuple[str, int, int]] = field(default_factory=list)

    def add(self, ids: list[int], kind: list[int]) -> None:
        """Add a whole text."""
        self.ids += ids
        self.kind += kind
        self.places += range(len(ids))

    def add_prompt(self, names: list[str], prompt: Prompt) -> None:
        """Add a prompt with its answers; ``names`` are the tasks of its questions."""
        ids, kind = list(prompt.context), [int(is_text) for is_text in prompt.is_text]
        for name, turn in zip(names, prompt.turns):
            at = len(self.ids) + len(ids) + len(turn.question)
            self.answers.append((name, at, len(turn.answer)))
            ids += turn.question + turn.answer
            kind += [0] * len(turn.question) + [2] * len(turn.answer)
        self.add(ids, kind)


def make_row(rng: random.Random, tokens: TextTokens, longest: int, size: int) -> Row:
    """Pack texts of at most ``longest`` tokens into a row of ``size``."""
    row = Row()
    while len(row.ids) < size:
        left = size - len(row.ids)
        # a third of the texts stay short: what is learned there costs less
        most = min(longest, SHORT) if rng.random() < 0.35 else longest
        length = round(most * 2 ** -rng.choice((0, 0, 1, 2)) * rng.uniform(0.7, 1))
        length = min(left, max(length, SHORTEST))
        if length < SHORTEST:
            text = tokens.haystack.stretch(rng, length - 1)
            row.add([0, *text], [0] + [1] * len(text))
            continue
        is_dense = most < longest and rng.random() < 0.5
        draw = draw_dense if is_dense and length >= 80 else draw_prompt
        row.add_prompt(*draw(rng, tokens, length))
    return row


class Training:
    """Model, optimiser, and how far they have come; all of it is in a checkpoint."""

    def __init__(self, model: BitNetForCausalLM, rate: float, longest: int) -> None:
        decayed = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        self.model, self.rate, self.longest = model.train(), rate, longest
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=rate, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip
        self.step, self.grown, self.seconds = 0, 0, 0.0

    def save(self, folder: Path) -> None:
        """Write everything."""
        numbers = {name: getattr(self, name) for name in ("step", "longest", "seconds")}
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**states, **numbers}, folder / "state.pt")
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote."""
        state = torch.load(folder / "state.pt")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.longest, self.seconds = (state[n] for n in ("step", "longest", "seconds"))
        self.grown = self.step

    def set_rate(self, steps: int, decay: int) -> None:
        """Warm up, stay, and fall to 0 in the last ``decay`` steps, without weight decay there."""
        falling = max(steps - self.step, 1) / decay
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step + 1) / WARM_UP, falling)
            if falling < 1:  # decay of master weights makes codes flip
                group["weight_decay"] = 0.0

    def learn(self, row: Row, text_weight: float) -> tuple[float, float, list[tuple[str, float]]]:
        """Take one step; returns the losses of answers and text, and each answer's accuracy."""
        device = self.model.device
        ids = torch.tensor([row.ids], device=device)
        kind, target = torch.tensor(row.kind[1:], device=device), ids[0, 1:]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            places = torch.tensor([row.places], device=device)
            # of positions that skip, the mask says that they are those of one text
            output = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places,
                use_cache=False,
            )  # fmt: skip
        logits = output.logits[0, :-1]
        nats = F.cross_entropy(logits.float(), target, reduction="none")
        text, answer = nats[kind == 1].mean(), nats[kind == 2].mean()
        (answer + text_weight * text).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        hit = (logits.argmax(-1) == target).tolist()
        shares = [(name, sum(hit[at - 1 : at - 1 + n]) / n) for name, at, n in row.answers]
        return answer.item(), text.item(), shares

    def grow(self, right: float) -> None:
        """Double the longest text if enough answers are right."""
        context = self.model.config.max_position_embeddings
        if right > GROW_AT and self.longest < context and self.step - self.grown > 100:
            self.longest, self.grown = 2 * self.longest, self.step - 1


@app.callback()
def main() -> None:
    """Keep the command's name although it is the only one."""


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, log and tokenizer.")],
    preset: Annotated[str, typer.Option(help="`cpu` or `gpu`.")] = "cpu",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1500,
    decay: Annotated[int, typer.Option(help="Last steps, in which the rate falls to 0.")] = 400,
    text_weight: Annotated[float, typer.Option(help="Of the loss on text beside answers.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of weights and texts.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
) -> None:
    """Train tokenizer and model, and save both with the master weights.

    Example: python examples/train_recall.py train --output runs/recall
    """
    sizes = PRESETS[preset]
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    if not (output / "tokenizer.json").exists():
        train_tokenizer(sizes.context).save_pretrained(output)
    tokens = TextTokens(AutoTokenizer.from_pretrained(output), held_out=False)
    model = new_model(sizes)
    head_start(model)
    training = Training(
        model.to("cuda" if torch.cuda.is_available() else "cpu"), sizes.rate, sizes.start
    )
    if resume:
        training.load(output)
    log = Log(output / "log.jsonl")
    while training.step < steps:
        training.set_rate(steps, decay)
        rng = random.Random(f"{seed}:{training.step}")
        row = make_row(rng, tokens, training.longest, max(training.longest, sizes.row))
        log.add(len(row.ids), *training.learn(row, text_weight))
        if training.step % LOG_EVERY == 0:
            training.seconds += log.seconds
            training.grow(log.write(training))
        if training.step % SAVE_EVERY == 0 or training.step == steps:
            training.save(output)


class Log:
    """Means over the last steps, on the screen and as lines of JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.started, self.tokens = time.perf_counter(), 0
        self.losses: list[tuple[float, float]] = []
        self.right: dict[str, list[float]] = defaultdict(list)

    @property
    def seconds(self) -> float:
        """Time since the last line."""
        return time.perf_counter() - self.started

    def add(self, size: int, answer: float, text: float, shares: list[tuple[str, float]]) -> None:
        """Remember a step."""
        self.tokens += size
        self.losses.append((answer, text))
        for name, share in shares:
            self.right[name].append(share)

    def write(self, training: Training) -> float:
        """Write a line; returns the mean accuracy of the tasks that lengths go by."""
        shares = {name: round(sum(v) / len(v), 3) for name, v in sorted(self.right.items())}
        answer, text = (sum(part) / len(part) for part in zip(*self.losses))
        line = {
            "step": training.step, "longest": training.longest, "answer": round(answer, 3),
            "text": round(text, 3), "tokens_per_second": round(self.tokens / self.seconds),
            "seconds": round(training.seconds), **shares,
        }  # fmt: skip
        console.print(json.dumps(line), soft_wrap=True, highlight=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._clear()
        return sum(shares.get(name, 0) for name in GROW_BY) / len(GROW_BY)


if __name__ == "__main__":
    app()
