"""Train the embedded model: a small BitNet b1.58 that writes Python.

The text is what any machine with Python has: the sources of the standard library, with their
documentation strings. Two per cent of the files, chosen by a hash of their names, are held out.

    python examples/train_tiny.py train --output runs/tiny
    python examples/train_tiny.py extend --source runs/tiny --output runs/tiny-4096
    python examples/train_tiny.py evaluate runs/tiny-4096
    bitnet-triton pack runs/tiny-4096 runs/tiny-packed --dtype bfloat16
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import statistics
import sysconfig
import tempfile
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
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import bitnet_triton as bt
from bitnet_triton import BitNetConfig, BitNetForCausalLM
from bitnet_triton.kernels import quantize_weight
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.nn import BitLinear

CONTEXT, LONG_CONTEXT = 1024, 4096
# Half of what YaRN multiplies cosines and sines with beyond ln 4: one number serves short and long
TEMPERATURE = 1.07
VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_PERCENT = 2
EIGHTHS = 8
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


class Windows(Dataset):
    """Batches in turns: one window of the long context, then as many tokens in short ones.

    Each window is drawn out of one file, by its number alone.
    """

    def __init__(self, files: list[Tensor], count: int, length: int | None = None) -> None:
        self.files, self.count, self.length = files, count, length or LONG_CONTEXT

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random.Random(index)
        length = CONTEXT if index % 2 else self.length
        files = [f for f in self.files if len(f) >= length]
        weights = [len(f) - length + CONTEXT for f in files]
        rows = []
        for tokens in rng.choices(files, weights, k=self.length // length):
            start = rng.randint(0, len(tokens) - length)
            rows.append(tokens[start : start + length].long())
        batch = torch.stack(rows)
        return {"input_ids": batch, "labels": batch}


def long_factors(config: BitNetConfig) -> list[float]:
    """Return by what YaRN divides each frequency for the long context (arXiv:2309.00071)."""
    yarn = copy.copy(config)
    yarn.rope_parameters = {
        "rope_type": "yarn", "rope_theta": config.rope_parameters["rope_theta"],
        "factor": LONG_CONTEXT / CONTEXT, "original_max_position_embeddings": CONTEXT,
    }  # fmt: skip
    slower, _ = ROPE_INIT_FUNCTIONS["yarn"](yarn, None)
    D = 2 * len(slower)
    trained = config.rope_parameters["rope_theta"] ** (-torch.arange(0, D, 2).double() / D)
    return [round(factor, 6) for factor in (trained / slower.double()).tolist()]


@torch.no_grad()
def spread_masters(model: torch.nn.Module, seed: int) -> None:
    """Give masters that packing has made equal back a distribution, with the codes they have.

    Where all masters of a code are equal, all of them would have to go the same long way to the
    next code, and would arrive together.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, BitLinear):
            codes, scale = quantize_weight(layer.weight)
            noise = torch.rand(codes.shape, generator=generator)
            small = 0.45 * (2 * noise - 1) * (codes == 0)
            large = 0.6 * (codes != 0)
            tail = -(1 - noise).log() * (codes != 0)
            # what is above 0.6 is stretched so that the mean of all, which is the scale, stays
            tail *= (codes.numel() - small.abs().sum() - large.sum()) / tail.sum()
            layer.weight.copy_(scale * (small + codes * (large + tail)))


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
    """Trainer with the two-stage learning rate of BitNet b1.58, or its second stage alone.

    In one stage data comes in its own order.
    """

    def __init__(self, *, one_stage: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.one_stage = one_stage

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.one_stage:
            return SequentialSampler(train_dataset or self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """Linear decay that restarts a third lower at half of the training."""
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            stage = 1.0 if self.one_stage or step < num_training_steps // 2 else 2 / 3
            return min(1.0, (step + 1) / warmup) * stage * (1 - step / num_training_steps)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


def bits_by_position(
    model: BitNetForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int
) -> tuple[Tensor, Tensor]:
    """Return bits and bytes of ``texts`` for each position in windows that do not overlap.

    Returns:
        Two tensors [context - 1], sums over all windows of what the position before predicts.
    """
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sizes = torch.tensor([len(word) for word in words])  # a letter of the alphabet is one byte
    bits, size = (torch.zeros(context - 1, dtype=torch.float64) for _ in range(2))
    for tokens in track(tokenize(tokenizer, texts), "Held-out files", len(texts), console=console):
        # each window begins with the token that the last one ended with: every token counts once
        for start in range(0, len(tokens) - 1, context - 1):
            window = tokens[start : start + context].long()
            with torch.inference_mode():
                logits = model(window[None], use_cache=False).logits[0, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            bits[: len(nats)] += nats.double() / math.log(2)
            size[: len(nats)] += sizes[window[1:]]
    return bits, size


def training_arguments(
    output: Path, steps: int, batch_size: int, learning_rate: float, compile: bool, **others: Any
) -> TrainingArguments:
    """Return what both trainings have in common, and the others."""
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=compile,
        save_total_limit=2,
        report_to="none",
        seed=0,
        **{"logging_steps": 20, "save_steps": min(200, steps), **others},
    )


def load_masters(source: Path) -> BitNetForCausalLM:
    """Load a model to train on: its own masters, or some that packed weights may have come from."""
    model = BitNetForCausalLM.from_pretrained(source, dtype=torch.float32)
    if any(isinstance(layer, BitLinear) for layer in model.modules()):
        return model
    with tempfile.TemporaryDirectory() as folder:
        masters = Path(folder) / "masters"
        convert_checkpoint(source, masters, to="masters", dtype=torch.float32)
        model = BitNetForCausalLM.from_pretrained(masters, dtype=torch.float32)
    spread_masters(model, seed=0)
    return model


def train_on_windows(
    model: BitNetForCausalLM,
    windows: Windows,
    output: Path,
    learning_rate: float,
    *,
    share: float = 1.0,
    resume: bool = False,
    compile: bool = False,
) -> None:
    """Train masters on windows, a long one and the short ones after it in a step, and save them."""
    steps = len(windows) // 2
    model.config._attn_implementation = "bitnet_triton"
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = TernaryTrainer(
        model=model,
        args=training_arguments(
            output, steps, 1, learning_rate, compile, weight_decay=0.0,
            gradient_accumulation_steps=2,  # a long window and short ones
            warmup_steps=steps // 10 + 1, logging_steps=5, save_steps=min(10, steps),
        ),
        train_dataset=windows,
        data_collator=lambda items: items[0],
        callbacks=[Speed(2 * windows.length)],
        one_stage=True,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume or None)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(before[name].to(weight.device).lerp(weight, share))
    model.config.use_cache = True  # Trainer turned it off; generation needs it
    trainer.save_model()


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
    arguments = training_arguments(
        output, steps, batch_size, learning_rate, compile, weight_decay=0.1,
        warmup_steps=min(200, steps // 10 + 1),
    )  # fmt: skip
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
def extend(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the result.")],
    source: Annotated[Path, typer.Option(help="The model to go on with.")] = Path(bt.TINY_MODEL),
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Peak.")] = 1e-4,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the trained weights, the rest as before.")
    ] = 0.5,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile the model: faster steps.")] = False,
    files: Annotated[int | None, typer.Option(help="Only the first files, for a trial.")] = None,
) -> None:
    """Go on training with windows of 4096 tokens and of 1024 in turns.

    Frequencies are LongRoPE's: windows of 1024 are read with those that the model has, longer ones
    with YaRN's. The result is a mean of the weights before and after (arXiv:2109.01903): it takes
    back what short windows lose by training, and most of what long ones win.

    Example: python examples/train_tiny.py extend --output runs/tiny-4096
    """
    tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=LONG_CONTEXT)
    tokenizer.save_pretrained(output)
    model = load_masters(source)
    bt.extend_context(
        model, LONG_CONTEXT / CONTEXT, "longrope", original_max_position_embeddings=CONTEXT,
        long_factor=long_factors(model.config), attention_factor=TEMPERATURE,
    )  # fmt: skip
    files_of_tokens = tokenize(tokenizer, read_texts(held_out=False, files=files))
    train_on_windows(
        model, Windows(files_of_tokens, 2 * steps), output, learning_rate, share=share,
        resume=resume, compile=compile,
    )  # fmt: skip
    tokenizer.save_pretrained(output)
    console.print(f"Saved master weights and tokenizer to {output}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of the model, packed or not.")],
    context: Annotated[
        int | None, typer.Option(help="Tokens of a window.  [default: the model's context]")
    ] = None,
    files: Annotated[int | None, typer.Option(help="Only the first files, for a trial.")] = None,
) -> None:
    """Print the loss on the held-out files in bits per byte, in all and by position.

    Example: python examples/train_tiny.py evaluate runs/tiny
    """
    loaded = BitNetForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = read_texts(held_out=True, files=files)
    context = context or loaded.config.max_position_embeddings
    bits, size = bits_by_position(loaded.eval(), tokenizer, texts, context)
    loss = (bits.sum() / size.sum()).item()
    console.print(
        f"{loss:.4f} bits per byte on {len(texts)} held-out files, {size.sum():.0f} bytes, windows "
        f"of {context} tokens"
    )
    for part, (b, s) in enumerate(zip(bits.chunk(EIGHTHS), size.chunk(EIGHTHS))):
        start = part * len(bits.chunk(EIGHTHS)[0])
        loss = (b.sum() / s.sum()).item()
        console.print(f"positions {start + 1:4d} to {start + len(b):4d}: {loss:.4f}")


if __name__ == "__main__":
    app()
