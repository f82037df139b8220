"""Distil a small dense Llama into a ternary model, beside the same training without a teacher.

The text is that of ``train_tiny.py`` beside this file, the sources of Python's standard library;
its held-out files are what losses are measured on.

    python examples/distill_tiny.py --output runs/distil

A killed run goes on where it was. Each of the models stays in the folder.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import bitnet_triton as bt
from bitnet_triton.training import SafeCheckpoints, last_checkpoint
from bitnet_triton.training.distill import Distillation, distill

sys.path.insert(0, str(Path(__file__).parent))
import train_tiny as tiny

LENGTH, STEP = 512, 4096
# What the teacher gives to each run: weights of its logits and of its relations
LESSONS = {
    "without": (0.0, 0.0),
    "distilled": (1.0, 1.0),
}
console = Console()


def dense_model() -> LlamaForCausalLM:
    """Build the dense model with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=256, intermediate_size=704,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def train_dense(folder: Path, texts: list[str], tokens: int) -> None:
    """Train the dense model on so many tokens, and save it with its tokenizer."""
    if (folder / "config.json").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    tiny.CONTEXT = LENGTH
    blocks = tiny.Blocks(torch.cat(tiny.tokenize(tokenizer, texts)))
    checkpoints = folder.with_name("dense-checkpoints")
    arguments = TrainingArguments(
        str(checkpoints), max_steps=max(1, tokens // STEP),
        per_device_train_batch_size=STEP // LENGTH, learning_rate=2e-3,
        lr_scheduler_type="cosine", warmup_steps=tokens // STEP // 20, adam_beta2=0.95,
        weight_decay=0.1, bf16=True, use_cpu=not torch.accelerator.is_available(),
        logging_steps=20, save_steps=100, report_to=[], seed=0,
    )  # fmt: skip
    model = dense_model()
    trainer = Trainer(model, arguments, train_dataset=blocks, callbacks=[SafeCheckpoints()])
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def measure(folder: Path, texts: list[str]) -> float:
    """Return bits per byte of a model, dense or ternary, on texts."""
    ternary = json.loads((folder / "config.json").read_text()).get("quantization_config")
    kind: Any = bt.BitNetForCausalLM if ternary else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bits, size = tiny.bits_by_position(model, tokenizer, texts, LENGTH)
    return (bits.sum() / size.sum()).item()


def teach(output: Path, name: str, seed: int, tokens: int, rate: float) -> dict[str, Any]:
    """Make one ternary model of the dense one, by one of the lessons; return what was trained."""
    logits, relations = LESSONS[name]
    job = Distillation(
        output=str(output / f"{name}-{seed}"), model=str(output / "dense"),
        data=str(output / "text.jsonl"), tokens=tokens, length=LENGTH, row=STEP // 2, accumulate=2,
        rate=rate, logits=logits, relations=relations, seed=seed,
    )  # fmt: skip
    return distill(job, tell)


def main(
    output: Annotated[Path, typer.Option(help="Folder of all runs.")],
    dense_tokens: Annotated[int, typer.Option(help="Tokens of the dense model.")] = 2_000_000,
    tokens: Annotated[int, typer.Option(help="Tokens of each ternary one.")] = 300_000,
    rate: Annotated[float, typer.Option(help="Peak learning rate of ternary ones.")] = 2e-3,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 2,
    files: Annotated[int | None, typer.Option(help="Only the first files, for a trial.")] = None,
) -> None:
    """Train the dense model, make ternary ones of it, and measure all of them."""
    output.mkdir(parents=True, exist_ok=True)
    texts = [text for text in tiny.read_texts(held_out=False, files=files) if text.strip()]
    held_out = tiny.read_texts(held_out=True, files=files)
    train_dense(output / "dense", texts, dense_tokens)
    write_texts(output / "text.jsonl", texts)
    found = {"dense": measured(output, "dense", held_out), "runs": {}}
    for seed, name in itertools.product(range(seeds), LESSONS):
        report = teach(output, name, seed, tokens, rate)
        trained = [report[part]["tokens"] for part in ("continued", "training")]
        found.setdefault("rounded", measured(output, f"{name}-{seed}/student", held_out))
        found["runs"][f"{name}-{seed}"] = {
            "tokens": trained,
            "bits_per_byte": measured(output, f"{name}-{seed}/model", held_out),
        }
    found |= {
        "command": " ".join(["python", *sys.argv]), "dense_tokens": dense_tokens,
        "files": len(held_out), "rate": rate,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    (output / "distillation.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found, seeds)


def write_texts(path: Path, texts: list[str]) -> None:
    """Write texts as JSON lines, in an order without meaning: the first are trained on."""
    texts = random.Random(0).sample(texts, len(texts))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def measured(output: Path, name: str, texts: list[str]) -> float:
    """Return what ``measure`` finds of a model, or has found before."""
    path = output / "bits" / f"{name.replace('/', '-')}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(measure(output / name, texts)))
    return json.loads(path.read_text())


def tell(what: str, step: int, steps: int, loss: float) -> None:
    """Say now and then how far a training is."""
    if step % 20 == 0 or step == steps:
        console.print(f"{what} {step}/{steps} {loss:.3f}")


def show(found: dict[str, Any], seeds: int) -> None:
    """Print the table."""
    heads = (f"seed {seed}" for seed in range(seeds))
    table = Table("model", *heads, title="bits per byte of held-out files")
    for name in ("dense", "rounded"):
        table.add_row(name, f"{found[name]:.4f}")
    for name in LESSONS:
        runs = (found["runs"][f"{name}-{seed}"] for seed in range(seeds))
        table.add_row(name, *(f"{run['bits_per_byte']:.4f}" for run in runs))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
