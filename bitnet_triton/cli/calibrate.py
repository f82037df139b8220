"""``bitnet-triton calibrate``: find the layers that have to keep full attention."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitnet_triton.cli import training as options

_OPTIONS: options.Options = {
    "attention": Annotated[
        str | None,
        typer.Option(
            help="What layers are changed to: a mode or a preset, with settings as in "
            "`swaa-trained:window=256` or `sliding:window=256,sinks=4`, or JSON, or a `.json` "
            "file. Full layers of a preset are chosen anew.  [swaa-trained]"
        ),
    ],
    "full_layers": Annotated[
        float | None,
        typer.Option(help="How many layers stay full: a number, or a share below 1.  [0.5]"),
    ],
    **options.RUN,
    **options.documents(text=0.0, tokens=20_000),
    **options.TEACHER,
    **options.SEED,
    **options.THREADS,
}


@options.takes(_OPTIONS)
def calibrate(given: dict[str, Any]) -> None:
    """Find which layers have to keep full attention, and write a plan that keeps them so.

    One layer at a time is changed to another attention; by how much less probable that makes the
    answers of some documents is its harm (the idea of arXiv:2606.27791). The most harmed layers
    stay full; plans by rule with as many full layers are measured beside, and the least harmful one
    is written. Nothing is trained.

    `attention.json` in the output goes to `--attention` of `adapt`, `eval` and `generate`. A run
    that was killed goes on with the same command.

    **Examples**

    - `bitnet-triton calibrate --attention swaa-trained:window=256 --full-layers 0.25 --output
      runs/layers`

    - `bitnet-triton adapt --attention runs/layers/attention.json --output runs/adapted`
    """
    from bitnet_triton.training import Calibration
    from bitnet_triton.training import calibrate as run

    job = options.read_job(Calibration, given)
    with options.bars() as tell:
        report = run(job, tell)
    options.show_harms(report)
