"""Train the embedded model: a small BitNet b1.58 that writes Python.

The text is what any machine with Python has: the sources of the standard library, with their
documentation strings. Two per cent of the files, chosen by a hash of their names, are held out.

    python examples/train_tiny.py train --output runs/tiny
    python examples/train_tiny.py evaluate runs/tiny
    bitnet-triton pack runs/tiny runs/tiny-packed
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bitnet_triton import BitNetConfig, BitNetForCausalLM
from bitnet_triton.kernels import quantize_weight
from bitnet_triton.nn import BitLinear

CONTEXT = 1024
VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_PERCENT = 2
# Tables of code points and installed packages: no prose, and not the same on every machine
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "__pycache__"}
# Words with one leading space, single digits, runs of punctuation, line ends with their indent
SPLIT = Regex(r" ?[^\W\d]+|\d| ?[^\s\w]+|\s*\n[ ]*|\s+")

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()


def standard_library() -> Iterator[tuple[str, str]]:
    """Yield name and text of the source files of the standard library, in the order of names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts):
            try:
                yield name.as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few tests of the standard library are not UTF-8
                continue


def read_texts(*, held_out: bool, files: int | None) -> list[str]:
    """Return the texts of one part; a hash of the names divides alike on every machine."""
    texts = (
        text
        for name, text in standard_library()
        if (int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT) == held_out
    )
    return list(islice(texts, files))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose encodings begin with the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPLIT, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


def new_model() -> BitNetForCausalLM:
    """Build the model with random master weights."""
    config = BitNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="bitnet_triton",
    )
    return BitNetForCausalLM(config)


class Blocks(Dataset):
    """All tokens in a row, cut into blocks of the context's length."""

    def __init__(self, tokens: Tensor) -> None:
        self.blocks = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index].long()
        return {"input_ids": block, "labels": block}


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    """Encode texts, each behind an end-of-text token."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    return [torch.tensor(e.ids, dtype=torch.int32) for e in encoded]


class TwoStages(TrainerCallback):
    """Drop the weight decay at half of the training, and log what the ternary weights do."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Decay on master weights makes codes flip: none in the second stage."""
        if optimizer is not None and state.global_step >= state.max_steps // 2:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Add the share of zero codes, which collapses or explodes when training goes wrong."""
        layers = [m for m in model.modules() if isinstance(m, BitLinear)]
        zeros = sum((quantize_weight(m.weight)[0] == 0).sum().item() for m in layers)
        logs["zero_share"] = round(zeros / sum(m.weight.numel() for m in layers), 3)


class Speed(TrainerCallback):
    """Log tokens per second, by the median step since the last log: compiling does not count."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Look at it again."""
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add the rate."""
        if self.seconds:
            logs["tokens_per_second"] = round(
                self.tokens_per_step / statistics.median(self.seconds)
            )
            self.seconds.clear()


class TernaryTrainer(Trainer):
    """Trainer with the two-stage learning rate of BitNet b1.58."""

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """Linear decay that restarts a third lower at half of the training."""
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            stage = 1.0 if step < num_training_steps // 2 else 2 / 3
            return min(1.0, (step + 1) / warmup) * stage * (1 - step / num_training_steps)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


def bits_per_byte(
    model: BitNetForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> float:
    """Return the loss on ``texts``, in windows of the context that do not overlap."""
    nats = 0.0
    for tokens in track(tokenize(tokenizer, texts), "Held-out files", len(texts), console=console):
        # each window begins with the token that the last one ended with: every token counts once
        for start in range(0, len(tokens) - 1, CONTEXT - 1):
            window = tokens[start : start + CONTEXT].long().unsqueeze(0)
            with torch.inference_mode():
                logits = model(window, use_cache=False).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the result.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3200,
    batch_size: Annotated[int, typer.Option(help=f"Blocks of {CONTEXT} tokens in a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Peak of the first stage.")] = 2e-3,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile the model: faster steps.")] = True,
    files: Annotated[int | None, typer.Option(help="Only the first files, for a trial.")] = None,
) -> None:
    """Train tokenizer and model, and save both with the master weights.

    Example: python examples/train_tiny.py train --output runs/tiny
    """
    texts = read_texts(held_out=False, files=files)
    if resume:
        tokenizer = AutoTokenizer.from_pretrained(output)
    else:
        tokenizer = train_tokenizer(texts)
        tokenizer.save_pretrained(output)
    tokens = torch.cat(tokenize(tokenizer, texts))
    size = sum(map(len, texts)) / 1e6
    console.print(f"{len(texts)} files, {size:.1f} M characters, {len(tokens) / 1e6:.1f} M tokens")

    torch.manual_seed(0)
    model = new_model()
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        adam_beta2=0.95,
        weight_decay=0.1,
        warmup_steps=min(200, steps // 10 + 1),
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=compile,
        logging_steps=20,
        save_steps=min(200, steps),
        save_total_limit=2,
        report_to="none",
        seed=0,
    )
    trainer = TernaryTrainer(
        model=model,
        args=arguments,
        train_dataset=Blocks(tokens),
        callbacks=[TwoStages(), Speed(batch_size * CONTEXT)],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    model.config.use_cache = True  # Trainer turned it off; generation needs it
    trainer.save_model()
    tokenizer.save_pretrained(output)
    console.print(f"Saved master weights and tokenizer to {output}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of the model, packed or not.")],
    files: Annotated[int | None, typer.Option(help="Only the first files, for a trial.")] = None,
) -> None:
    """Print the loss on the held-out files in bits per byte.

    Example: python examples/train_tiny.py evaluate runs/tiny
    """
    loaded = BitNetForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = read_texts(held_out=True, files=files)
    loss = bits_per_byte(loaded.eval(), tokenizer, texts)
    console.print(f"{loss:.4f} bits per byte on {len(texts)} held-out files")


if __name__ == "__main__":
    app()
