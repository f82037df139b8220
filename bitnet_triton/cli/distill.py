"""``bitnet-triton distill``: make a ternary model of a dense one, taught by the dense one."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from bitnet_triton.cli import training as options

_OPTIONS: options.Options = {
    "model": Annotated[
        str | None,
        typer.Option(
            help="The dense model: a folder or a name on the Hub, Llama, Mistral or Qwen2 by its "
            "config.  [required]"
        ),
    ],
    "data": Annotated[
        str | None,
        typer.Option(
            help='A text file, or JSON lines, each `{"text": ...}` or `{"prompt": ..., "answer": '
            "...}`; every tenth document is held out.  [required]"
        ),
    ],
    **{name: options.RUN[name] for name in ("output", "config")},
    "teacher": Annotated[
        str | None,
        typer.Option(help="Another dense model with the same tokens.  [the model itself]"),
    ],
    "corpus": Annotated[
        str | None,
        typer.Option(help="Plain text of the first training, as `--data`.  [a part of the data]"),
    ],
    "tokens": Annotated[int | None, typer.Option(help="Of both trainings together.  [1000000]")],
    "continued": Annotated[
        float | None,
        typer.Option(help="Share of them for the first training, without a teacher.  [0.25]"),
    ],
    "logits": Annotated[
        float | None,
        typer.Option(help="How much the teacher's logits count beside the next token.  [1]"),
    ],
    "relations": Annotated[
        float | None,
        typer.Option(help="How much relations of queries, keys and values count.  [1]"),
    ],
    "temperature": Annotated[
        float | None,
        typer.Option(help="Of the logits; above 1, what is unlikely counts more.  [1]"),
    ],
    "layer": Annotated[
        int | None,
        typer.Option(help="Whose relations are learned; -1 is the last one.  [-1]"),
    ],
    "length": Annotated[int | None, typer.Option(help="Tokens of a document at most.  [512]")],
    "rate": Annotated[
        float | None,
        typer.Option(help="Peak learning rate of each training; falls by a cosine.  [1e-3]"),
    ],
    **options.SCHEDULE,
    **options.SEED,
    **options.THREADS,
}


@options.takes(_OPTIONS)
def distill(given: dict[str, Any]) -> None:
    """Turn a dense Llama-style model into a ternary one (BitDistill, arXiv:2510.13998).

    Norms are put in front of the output projections of attention and MLP, the weights become
    masters of ternary codes, and two trainings follow: a short one on plain text, and one in which
    the dense model teaches beside the next token, by its logits and by how its queries, keys and
    values relate to each other in one layer. `--logits 0 --relations 0` is quantisation-aware
    training without a teacher, to compare with.

    A model with parts that a BitNet layer has no place for (norms of queries and keys, biases in
    the MLP, sliding windows) and a teacher with other tokens are refused before anything is
    trained. The activation of the dense model stays; other than squared ReLU, inference runs
    module by module, and says so in the log.

    A run that was killed goes on with the same command, bit for bit. The output holds `model`,
    packed, for `BitNetForCausalLM.from_pretrained`, `bitnet-triton generate` and transformers'
    own BitNet class, and `trained`, its masters, for `bitnet-triton train`.

    **Examples**

    - `bitnet-triton distill --model runs/dense --data book.txt --output runs/ternary`

    - `bitnet-triton distill --model Qwen/Qwen2-0.5B --corpus text.jsonl --data tasks.jsonl --tokens
      20000000 --layer -4 --output runs/qwen`

    - `bitnet-triton distill --config distill.yaml --seed 1 --output runs/again`, where
      `distill.yaml` has lines such as `model: runs/dense` and `temperature: 2`
    """
    from bitnet_triton.training.distill import Distillation
    from bitnet_triton.training.distill import distill as run

    job = options.read_job(Distillation, given)
    with options.bars() as tell:
        report = run(job, tell)
    _show(report)


def _show(report: dict[str, Any]) -> None:
    """Print what became of the model."""
    stages = [stage for stage in (report["continued"], report["training"]) if stage]
    tokens, steps = (sum(stage[name] for stage in stages) for name in ("tokens", "steps"))
    options.console.print(
        f"{tokens} tokens in {report['documents']} documents, {steps} steps; "
        f"{report['training']['trained']} parameters were trained"
    )
    table = Table(title=f"loss on {report['held_out']} held-out documents", title_justify="left")
    table.add_column("model")
    table.add_column("nats a token", justify="right")
    names = {
        "dense": "dense teacher", "student": "ternary, not trained",
        "continued": "trained without a teacher", "trained": "trained with it",
    }  # fmt: skip
    for name, loss in report["losses"].items():
        if loss is not None:
            table.add_row(names[name], f"{loss:.4f}")
    options.console.print(table)
    options.console.print(
        f"Wrote {report['run']['output']}/model, and its masters to trained beside it"
    )
