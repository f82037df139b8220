"""Give a dense model the index of ``indexed_blocks``, and train nothing but that.

The weights of the model stay as they are; the index learns from its attention. First attention
reads everything ("dense"), then, where rows are asked for, what the index chooses ("selected").
The embedded recall model takes less than one hundredth of the tokens that it was trained on. Rows
are short: steps are what few tokens have to be divided into, and texts may be longer afterwards.

    python examples/convert_sparse.py --output runs/indexed
    bitnet-triton eval --model runs/indexed --length 2048
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.data import Dataset
from train_recall import make_row
from transformers import AutoTokenizer, Trainer, TrainingArguments

import bitnet_triton as bt
from bitnet_triton.models.convert import convert_checkpoint
from bitnet_triton.training.tasks import TextTokens


class Rows(Dataset):
    """Rows of packed texts, drawn from their number and a seed alone."""

    def __init__(self, tokens: TextTokens, rows: int, length: int, seed: int) -> None:
        self.tokens, self.rows, self.length, self.seed = tokens, rows, length, seed

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return ids and positions of a row; labels are there for the loss that modes add to."""
        rng = random.Random(f"sparse:{self.seed}:{number}")
        row = make_row(rng, self.tokens, self.length, self.length)
        ids, kind = torch.tensor(row.ids), torch.tensor(row.kind)
        labels = ids.masked_fill(kind != 2, -100)
        return {"input_ids": ids, "labels": labels, "position_ids": torch.tensor(row.places)}


def train_index(
    model: bt.BitNetForCausalLM, attention: dict[str, Any], rows: Dataset, rate: float, folder: str
) -> float:
    """Train the index of a model with master weights; return the loss of its last step."""
    bt.set_attention(model, attention)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".indexed_blocks." in name
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=1, num_train_epochs=1, learning_rate=rate,
        lr_scheduler_type="cosine", logging_steps=1, save_strategy="no", report_to=[],
        remove_unused_columns=False, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    return float(model.mode_loss)


def copy_index(trained: bt.BitNetForCausalLM, model: bt.BitNetForCausalLM) -> None:
    """Give a model the index of another one that has been trained."""
    for ours, theirs in zip(model.model.layers, trained.model.layers):
        state = theirs.self_attn.indexed_blocks.state_dict()
        ours.self_attn.indexed_blocks.load_state_dict(state)


def convert(
    output: Annotated[Path, typer.Option(help="Folder for the model with its index.")],
    model: Annotated[Path, typer.Option(help="Folder of a packed dense model.")] = Path(
        bt.RECALL_MODEL
    ),
    block: Annotated[int, typer.Option(help="Tokens of a block.")] = 8,
    selected: Annotated[int, typer.Option(help="Blocks that a token reads.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    dense_rows: Annotated[int, typer.Option(help="Rows of the first stage.")] = 36,
    selected_rows: Annotated[int, typer.Option(help="Rows of the second stage.")] = 0,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 5e-3,
    seed: Annotated[int, typer.Option(help="Of the texts.")] = 0,
) -> None:
    """Train an index beside a frozen model, and save both."""
    attention = {"mode": "indexed_blocks", "block": block, "selected": selected}
    tokens = TextTokens(AutoTokenizer.from_pretrained(model), held_out=False)
    with tempfile.TemporaryDirectory() as folder:
        masters = Path(folder) / "masters"
        convert_checkpoint(model, masters, to="masters")
        trained = bt.BitNetForCausalLM.from_pretrained(masters, dtype=torch.float32)
        for stage, rows in (("dense", dense_rows), ("selected", selected_rows)):
            if rows:
                data = Rows(tokens, rows, length, seed + len(stage))
                loss = train_index(trained, {**attention, "stage": stage}, data, rate, folder)
                typer.echo(f"{stage}: {rows * length} tokens, KL of the last step {loss:.4f}")
    packed = bt.set_attention(bt.BitNetForCausalLM.from_pretrained(model, fuse=False), attention)
    copy_index(trained, packed)
    packed.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    typer.echo(f"saved {output}")


if __name__ == "__main__":
    typer.run(convert)
