"""``bitnet-triton train``: pre-train a ternary model, or go on with one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitnet_triton.cli import training as options

_OPTIONS: options.Options = {
    **options.RUN,
    "scratch": Annotated[
        bool | None,
        typer.Option(
            "--scratch/--continue",
            help="Begin with random weights and take only sizes and tokenizer of the model, or go "
            "on with its weights.  [continue]",
        ),
    ],
    "attention": Annotated[
        str | None,
        typer.Option(
            help="A mode or a preset, with settings, or JSON, or a `.json` file; may train.  [full]"
        ),
    ],
    **options.documents(text=0.1, tokens=1_000_000),
    "rate": Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of the first stage; the second begins at two thirds.  [1.5e-3]"
        ),
    ],
    **options.SCHEDULE,
    **options.SEED,
    **options.EVALUATION,
    **options.THREADS,
}


@options.takes(_OPTIONS)
def train(given: dict[str, Any]) -> None:
    """Train all weights of a BitNet b1.58 model, from random ones or from those that it has.

    Masters in float32 under bfloat16 autocast, by the two stages of the b1.58 training notes: the
    rate falls linearly and restarts lower at half of the training, where weight decay ends. Shares
    of the codes, flips and the error of quantisation are in `training.json`. Packed weights that
    are trained on become masters of equal size first, which takes a while to loosen: the masters of
    the former training, where you have them, are a better `--model`.

    A run that was killed goes on with the same command, bit for bit. The output holds `model`,
    packed, and `trained`, its masters.

    **Examples**

    - `bitnet-triton train --scratch --model tiny --data book.txt --tokens 2000000 --output
      runs/book`

    - `bitnet-triton train --model runs/book/trained --data more.jsonl --rate 5e-4 --output
      runs/more`
    """
    from bitnet_triton.training.adapt import pretrain
    from bitnet_triton.training.jobs import Pretraining

    job = options.read_job(Pretraining, given)
    with options.bars() as tell:
        report = pretrain(job, tell)
    options.show(report)
