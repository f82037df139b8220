"""Every rope method at eight times the trained length, before and after a short training.

Text: a model trained to 1024 tokens reads files of the standard library that it has not met, in
windows of 8192 tokens; the same tokens in windows of 1024 are what it is measured by. A run that
was killed goes on, cell by cell. The text model is the embedded one before it was extended:

    git archive f0388d3 bitnet_triton/assets/tiny | tar -x --strip-components=2
    python examples/longer_contexts.py --source tiny --output runs/longer
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import train_tiny as tiny
import typer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

import bitnet_triton as bt
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.training.longrope import LongRopeJob, search_longrope
from bitnet_triton.training.options import write_whole
from bitnet_triton.training.results import Store
from bitnet_triton.training.subject import digest

TIMES, SEARCHED_ON = 8, 3
STRETCH = 512  # tokens whose bits are added up
METHODS = ("none", "linear", "ntk", "dynamic", "yarn", "longrope")
YARNS = ("yarn", "mild_yarn", "dynamic_yarn")  # measured at half of TIMES, too
ORDER = (*METHODS, *YARNS[1:])
TRAININGS = (*product(YARNS, [4]), ("yarn", 8), ("longrope", 8))
Factors = Sequence[float]


def extended(model: Any, method: str, factor: float, searched: Factors) -> Any:
    """Give a model a method.

    "mild_yarn" multiplies scores by YaRN's temperature 0.1 ln(factor) + 1 once, not twice: short
    texts, which were trained on without it, lose less.
    """
    more: dict[str, Any] = {"long_factor": searched} if method == "longrope" else {}
    if method == "mild_yarn":
        method, more = "yarn", {"attention_factor": math.sqrt(0.1 * math.log(factor) + 1)}
    return model if method == "none" else bt.extend_context(model, factor, method, **more)


def load(folder: Path, method: str = "none", factor: float = 1, searched: Factors = ()) -> Any:
    """Load a model to be measured; "none" leaves it as it is."""
    model = bt.BitNetForCausalLM.from_pretrained(folder, fuse=True).eval()
    return extended(model, method, factor, searched)


def cut(files: Sequence[Tensor], length: int) -> tuple[list[Tensor], list[int]]:
    """Return texts of a length and the token behind each, and the numbers of their files."""
    places = [
        (number, start)
        for number, tokens in enumerate(files)
        for start in range(0, len(tokens) - length, length)
    ]
    texts = [files[number][start : start + length + 1].long() for number, start in places]
    return texts, [number for number, _ in places]


@torch.inference_mode()
def text_bits(model: Any, texts: Sequence[Tensor], window: int) -> list[list[float]]:
    """Return what texts cost in windows that share no token, by stretches of their own."""
    found = []
    for tokens in texts:
        logits = model(tokens[:-1].view(-1, window), use_cache=False).logits.flatten(0, 1)
        nats = F.cross_entropy(logits.float(), tokens[1:], reduction="none").double()
        bits = nats.view(-1, STRETCH).sum(1) / math.log(2)
        found.append([round(value, 2) for value in bits.tolist()])
    return found


def search(output: Path, source: Path, files: Sequence[Tensor], tokenizer: Any) -> Factors:
    """Search factors on files that were trained on."""
    length, paths = TIMES * tiny.CONTEXT, []
    long = [tokens for tokens in files if len(tokens) > length + 64]
    for n in range(SEARCHED_ON):
        paths.append(str(output / f"search-{n}.txt"))
        tokens = long[len(long) * n // SEARCHED_ON][1 : length + 64]
        Path(paths[-1]).write_text(tokenizer.decode(tokens), encoding="utf-8")
    job = LongRopeJob(
        str(output / "search"), str(source.resolve()), paths, TIMES, samples=SEARCHED_ON,
        population=12, generations=6,
    )  # fmt: skip
    return search_longrope(job)["long"]["factors"]


def train(
    output: Path, source: Path, files: Sequence[Tensor], how: tuple[str, int], tokens: int,
    rate: float, searched: Factors,
) -> Path:  # fmt: skip
    """Train on long windows and as many tokens in short ones, in turns; return the packed model."""
    masters, packed = output / "{}-{}".format(*how), output / "{}-{}-packed".format(*how)
    if not packed.exists():
        model, length = tiny.load_masters(source), how[1] * tiny.CONTEXT
        windows = tiny.Windows(files, 2 * (tokens // (2 * length)), length)
        resume = any(masters.glob("checkpoint-*"))
        extended(model, *how, searched)
        tiny.train_on_windows(model, windows, masters, rate, resume=resume)
        for path in source.glob("tokenizer*"):
            shutil.copy(path, masters)
        convert_checkpoint(masters, packed, dtype=torch.bfloat16)
    return packed


def change(a: Any, b: Any, files: Sequence[int]) -> list[float]:
    """Return by how many % texts cost more in ``a`` than in ``b``, and its 95 % interval.

    Whole files are drawn again and again, the same for both (a paired bootstrap).
    """
    names = torch.tensor(files).unique(return_inverse=True)[1]
    costs = torch.tensor([[sum(text) for text in side] for side in (a, b)], dtype=torch.double)
    sums = torch.zeros(2, int(names.max()) + 1, dtype=torch.double).index_add_(1, names, costs)
    draws = torch.randint(
        sums.shape[1], (9999, sums.shape[1]), generator=torch.Generator().manual_seed(0)
    )
    drawn = sums[:, draws].sum(2)
    low, high = (drawn[0] / drawn[1]).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    middle = (sums[0].sum() / sums[1].sum()).item()
    return [round(100 * (ratio - 1), 2) for ratio in (middle, low, high)]


def summarise(lines: list[dict[str, Any]], sizes: Tensor, files: Sequence[int]) -> dict[str, Any]:
    """Return bits per byte and their changes, from what was measured.

    Args:
        lines: one for each cell.
        sizes: bytes of the stretches of each text.
        files: of the texts.
    """
    cells = {
        (line["when"], line["method"], line["factor"], line["window"]): line["found"]
        for line in lines
    }
    plain = cells["before", "none", TIMES, tiny.CONTEXT]
    rows, bytes_of = [], sizes.sum(0)
    for (when, method, factor, window), found in cells.items():
        bits = torch.tensor(found, dtype=torch.double)
        place = torch.arange(len(bytes_of)) % (window // STRETCH)
        by_place = [
            (bits.sum(0)[place == p].sum() / bytes_of[place == p].sum()).item()
            for p in range(window // STRETCH)
        ]
        row = {
            "when": when, "method": method, "factor": factor, "window": window,
            "bits_per_byte": round((bits.sum() / sizes.sum()).item(), 4),
            "by_position": [round(value, 4) for value in by_place],
            "change": change(found, plain, files),
        }  # fmt: skip
        yarn = cells.get((when, "yarn", factor, window))
        if method == "longrope" and yarn:
            row["change_from_yarn"] = change(found, yarn, files)
        rows.append(row)
    same = torch.tensor(plain, dtype=torch.double).sum(0) / bytes_of
    return {
        "as_trained_by_position": [round(value, 4) for value in same.tolist()],
        "text": rows,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """Return the table of the documentation."""
    text = "| training | method | tokens | bits per byte | against 1024 | short texts |\n"
    text += "| --- | --- | --- | --- | --- | --- |\n"
    cells = {(r["when"], r["method"], r["factor"], r["window"]): r for r in result["text"]}
    order = sorted(cells, key=lambda key: (key[0] == "after", ORDER.index(key[1]), key[2]))
    for when, method, factor, window in order:
        if window > tiny.CONTEXT:
            row = cells[when, method, factor, window]
            short = cells[when, method, factor, tiny.CONTEXT]
            changes = ["{:+.1f} % ({:+.1f} to {:+.1f})".format(*r["change"]) for r in (row, short)]
            values = [when, method, str(window), f"{row['bits_per_byte']:.3f}", *changes]
            text += f"| {' | '.join(values)} |\n"
    return text


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw bits per byte by position, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    same = result["as_trained_by_position"]
    middles = [STRETCH * (place + 0.5) for place in range(len(same))]
    for axis, when in zip(axes, ("before", "after")):
        axis.plot(middles, same, "k:", label=f"the same in windows of {tiny.CONTEXT}, as trained")
        for row in result["text"]:
            if row["when"] == when and row["window"] == TIMES * tiny.CONTEXT:
                color = f"C{ORDER.index(row['method'])}"
                axis.plot(middles, row["by_position"], color=color, label=row["method"])
        axis.set(xlabel="position", ylabel="bits per byte", ylim=(0.8, 2.3))
        axis.set_title(f"text, {when} training", fontsize=10)
        axis.legend(fontsize=7, ncol=2, loc="upper left")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(
    source: Annotated[Path, typer.Option(help="A text model that was never extended.")],
    output: Annotated[Path, typer.Option(help="Folder of the run and its results.")],
    tokens: Annotated[int, typer.Option(help="Of each training.")] = 163840,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
) -> None:
    """Measure, train, measure; write ``longer-contexts.json``, ``.md`` and ``.png``."""
    kind = bt.BitNetConfig.from_pretrained(source).rope_parameters["rope_type"]
    if kind != "default":
        raise typer.BadParameter(f"`--source`: expected rope type default, got {kind}")
    store = Store(output, {"source": digest(str(source)), "tokens": tokens, "rate": rate})
    tokenizer = AutoTokenizer.from_pretrained(source)
    known, held_out = (
        tiny.tokenize(tokenizer, tiny.read_texts(held_out=part, files=None))
        for part in (False, True)
    )
    texts, files = cut(held_out, TIMES * tiny.CONTEXT)

    def once(make: Callable[[], Any], **key: Any) -> None:
        if not store.has(**key):
            store.add({**key, "found": make()})
            typer.echo(f"{key}: done")

    def measure(folder: Path, when: str, method: str, factor: int) -> None:
        how = (method if when == "before" else "none", factor, factors)
        for window in (factor * tiny.CONTEXT, tiny.CONTEXT):
            once(
                lambda window=window: text_bits(load(folder, *how), texts, window),
                when=when, method=method, factor=factor, window=window,
            )  # fmt: skip

    factors = search(output, source, known, tokenizer)
    for method, factor in [*product(METHODS, [TIMES]), *product(YARNS, [TIMES // 2])]:
        measure(source, "before", method, factor)
    for method, factor in TRAININGS:
        folder = train(output, source, known, (method, factor), tokens, rate, factors)
        measure(folder, "after", method, factor)

    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sizes = torch.tensor([len(word) for word in words])  # a letter of its alphabet is a byte
    bytes_of = torch.stack([sizes[text[1:]].view(-1, STRETCH).sum(1) for text in texts])
    result = {
        "command": shlex.join(["python", *sys.argv]), **store.run,
        "texts": len(texts), "files": len(set(files)), "bytes": int(bytes_of.sum()),
        "searched": factors, **summarise(store.lines, bytes_of, files),
    }  # fmt: skip
    write_whole(output / "longer-contexts.json", json.dumps(result, indent=1) + "\n")
    write_whole(output / "longer-contexts.md", as_markdown(result))
    draw(result, output / "longer-contexts.png")
    typer.echo(as_markdown(result))


if __name__ == "__main__":
    typer.run(main)
