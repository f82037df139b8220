"""``bitnet-triton adapt``: teach a model to live with another attention."""

from __future__ import annotations

from typing import Annotated

import typer

from bitnet_triton.cli import training as options


def adapt(
    attention: Annotated[
        str | None,
        typer.Option(
            help="What to adapt to: a mode or a preset, with settings as in "
            "`swaa-trained:window=256` or `sliding:window=256,sinks=4`, or JSON as in "
            "config.attention.  [swaa-trained]"
        ),
    ] = None,
    output: options.Output = None,
    model: options.Model = None,
    config: options.Config = None,
    data: options.Data = None,
    text: options.Text = None,
    tokens: Annotated[int | None, typer.Option(help="Of the training.  [20000]")] = None,
    length: options.Length = None,
    row: options.Row = None,
    question: options.Question = None,
    self_distill: Annotated[
        bool | None,
        typer.Option(
            "--self-distill/--given-answers",
            help="Train on the answers that the model gives with full attention, if they are "
            "right, or on those of the data.  [given]",
        ),
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of such an answer to a file's prompt.  [64]")
    ] = None,
    lora: Annotated[
        bool | None,
        typer.Option(
            "--lora/--full", help="Train adapters beside packed weights, or all weights.  [lora]"
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapters.  [16]")] = None,
    alpha: Annotated[float | None, typer.Option(help="Adapters count alpha / rank.  [128]")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A linear with adapters; may be repeated.  [q_proj, k_proj, v_proj]"),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; falls by a cosine.  [1e-4]")
    ] = None,
    warm_up: options.WarmUp = None,
    accumulate: options.Accumulate = None,
    epochs: options.Epochs = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--beside",
            help="Put the adapters into the packed weights, and say what that loses; or keep them "
            "beside.  [beside]",
        ),
    ] = None,
    transfer: Annotated[
        int | None,
        typer.Option(
            help="Times that the documents are seen beforehand by weights that a mode brings "
            "along (`linear`, `native_sparse`): layer by layer, they learn to give what full "
            "attention gave.  [0]"
        ),
    ] = None,
    transfer_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of that.  [3e-3]")
    ] = None,
    save_every: options.SaveEvery = None,
    seed: options.Seed = None,
    eval_task: options.EvalTask = None,
    eval_length: options.EvalLength = None,
    eval_samples: options.EvalSamples = None,
    eval_seed: options.EvalSeed = None,
    threads: options.Threads = None,
) -> None:
    """Adapt a model that was trained with full attention to another one, and measure both.

    Under a window, a model loses what stands beyond it; sliding window adaptation (SWAA,
    arXiv:2512.10411) brings it back by layers and generated tokens that still see everything, and
    by a short training under the same mask: adapters on the projections of queries, keys and
    values, which learn the answers that the model gave itself with full attention. Documents are
    packed, each with its own prompt; the mask is that of inference.

    A mode says what is trained: for most, adapters (`--lora`) or all weights (`--full`); for
    `indexed_blocks` its index alone; modes that sample have no gradient and are refused.

    Before and after, `bitnet-triton eval` measures retrieval tasks and text. A run that was killed
    goes on with the same command, bit for bit. `BitNetForCausalLM.from_pretrained` and
    `bitnet-triton eval --model` take the folder `model` in the output, adapters and attention
    included.

    **Examples**

    - `bitnet-triton adapt --attention swaa-trained:window=256 --output runs/adapted --self-distill`

    - `bitnet-triton adapt --attention sliding:window=512,sinks=16 --data notes.jsonl --rate 1e-3
      --merge --output runs/notes`

    - `bitnet-triton adapt --config adapt.yaml --seed 1 --output runs/again`, where `adapt.yaml` has
      lines such as `attention: swaa-trained:window=256` and `self_distill: true`
    """
    import torch

    from bitnet_triton.training.adapt import adapt as run
    from bitnet_triton.training.jobs import Adaptation

    job = options.read_job(
        Adaptation,
        config,
        {
            "attention": attention, "output": output, "model": model, "data": data, "text": text,
            "tokens": tokens, "length": length, "row": row, "question": question,
            "self_distill": self_distill, "answer_tokens": answer_tokens, "lora": lora,
            "rank": rank, "alpha": alpha, "targets": target, "rate": rate, "warm_up": warm_up,
            "accumulate": accumulate, "epochs": epochs, "merge": merge, "transfer": transfer,
            "transfer_rate": transfer_rate, "save_every": save_every, "seed": seed,
            "eval_tasks": eval_task, "eval_length": eval_length,
            "eval_samples": eval_samples, "eval_seed": eval_seed,
        },
    )  # fmt: skip
    if threads:
        torch.set_num_threads(threads)
    with options.bars() as tell:
        report = run(job, tell)
    options.show(report)
