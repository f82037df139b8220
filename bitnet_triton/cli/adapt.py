"""``bitnet-triton adapt``: teach a model to live with another attention."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitnet_triton.cli import training as options

_OPTIONS: options.Options = {
    "attention": Annotated[
        str | None,
        typer.Option(
            help="What to adapt to: a mode or a preset, with settings as in "
            "`swaa-trained:window=256` or `sliding:window=256,sinks=4`, or JSON as in "
            "config.attention, or a `.json` file with that.  [swaa-trained]"
        ),
    ],
    **options.RUN,
    **options.documents(text=0.1, tokens=20_000),
    **options.TEACHER,
    "lora": Annotated[
        bool | None,
        typer.Option(
            "--lora/--full", help="Train adapters beside packed weights, or all weights.  [lora]"
        ),
    ],
    "rank": Annotated[int | None, typer.Option(help="Of the adapters.  [16]")],
    "alpha": Annotated[float | None, typer.Option(help="Adapters count alpha / rank.  [128]")],
    "targets": Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="A linear with adapters; may be repeated.  [q_proj, k_proj, v_proj]",
        ),
    ],
    "rate": Annotated[
        float | None, typer.Option(help="Peak learning rate; falls by a cosine.  [1e-4]")
    ],
    **options.SCHEDULE,
    "merge": Annotated[
        bool | None,
        typer.Option(
            "--merge/--beside",
            help="Put the adapters into the packed weights, and say what that loses; or keep them "
            "beside.  [beside]",
        ),
    ],
    "transfer": Annotated[
        int | None,
        typer.Option(
            help="Times that the documents are seen beforehand by weights that a mode brings "
            "along (`linear`, `native_sparse`): layer by layer, they learn to give what full "
            "attention gave.  [0]"
        ),
    ],
    "transfer_rate": Annotated[
        float | None, typer.Option(help="Peak learning rate of that.  [3e-3]")
    ],
    **options.SEED,
    **options.EVALUATION,
    **options.THREADS,
}


@options.takes(_OPTIONS)
def adapt(given: dict[str, Any]) -> None:
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
    from bitnet_triton.training.adapt import adapt as run
    from bitnet_triton.training.jobs import Adaptation

    job = options.read_job(Adaptation, given)
    with options.bars() as tell:
        report = run(job, tell)
    options.show(report)
