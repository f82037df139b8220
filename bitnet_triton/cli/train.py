"""``bitnet-triton train``: pre-train a ternary model, or go on with one."""

from __future__ import annotations

from typing import Annotated

import typer

from bitnet_triton.cli import training as options


def train(
    output: options.Output = None,
    model: options.Model = None,
    scratch: Annotated[
        bool | None,
        typer.Option(
            "--scratch/--continue",
            help="Begin with random weights and take only sizes and tokenizer of the model, or go "
            "on with its weights.  [continue]",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="A mode or a preset, with settings, or JSON; may train.  [full]"),
    ] = None,
    config: options.Config = None,
    data: options.Data = None,
    text: options.Text = None,
    tokens: Annotated[int | None, typer.Option(help="Of the training.  [1000000]")] = None,
    length: options.Length = None,
    row: options.Row = None,
    question: options.Question = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of the first stage; the second begins at two thirds.  [1.5e-3]"
        ),
    ] = None,
    warm_up: options.WarmUp = None,
    accumulate: options.Accumulate = None,
    epochs: options.Epochs = None,
    save_every: options.SaveEvery = None,
    seed: options.Seed = None,
    eval_task: options.EvalTask = None,
    eval_length: options.EvalLength = None,
    eval_samples: options.EvalSamples = None,
    eval_seed: options.EvalSeed = None,
    threads: options.Threads = None,
) -> None:
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
    import torch

    from bitnet_triton.training.adapt import pretrain
    from bitnet_triton.training.jobs import Pretraining

    job = options.read_job(
        Pretraining,
        config,
        {
            "output": output, "model": model, "scratch": scratch, "attention": attention,
            "data": data, "text": text, "tokens": tokens, "length": length, "row": row,
            "question": question, "rate": rate, "warm_up": warm_up, "accumulate": accumulate,
            "epochs": epochs, "save_every": save_every, "seed": seed, "eval_tasks": eval_task,
            "eval_length": eval_length, "eval_samples": eval_samples, "eval_seed": eval_seed,
        },
    )  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    with options.bars() as tell:
        report = pretrain(job, tell)
    options.show(report)
