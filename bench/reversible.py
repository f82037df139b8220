"""The command ``reversible``: memory and time of a training step by depth, three ways.

Activations are what a step has at its peak beyond weights and the gradients of a step before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from bench.machine import command_line, describe_machine, describe_software
from bench.memory import peak_extra_bytes
from bench.options import Device, Output, read_settings, target
from bench.report import size, write_json
from bench.run import console, shown
from bench.turns import orders, seconds
from bitnet_triton import BitNetConfig, BitNetForCausalLM

DEPTHS = (4, 8, 16)
LABELS = {
    "plain": "plain",
    "checkpointing": "gradient checkpointing",
    "reversible": "reversible",
}


def measure(width: int, tokens: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return for each depth and provider the bytes of activations, and the seconds of steps.

    Args:
        width: of the hidden states; four heads, twice as much in the MLP.
        tokens: of the one text of a step.
        rounds: how many steps of each provider are timed; they take turns.
        device: where the steps run.
    """
    rows = []
    for layers in DEPTHS:
        steps = {name: _step(name, width, layers, tokens, device) for name in LABELS}
        peaks = {}
        for name, step in steps.items():
            step()  # compiles, and makes the gradients: the step that is measured adds to them
            peaks[name] = peak_extra_bytes(step, device)
        times: dict[str, list[float]] = {name: [] for name in LABELS}
        square = orders(list(LABELS))
        for i in range(rounds):
            for name in square[i % len(square)]:
                times[name].append(seconds(steps[name]))
        rows += [
            {
                "provider": name,
                "layers": layers,
                "activation_bytes": peaks[name],
                "seconds": times[name],
                "times_plain": median(a / b for a, b in zip(times[name], times["plain"])),
            }
            for name in LABELS
        ]
    return rows


def _step(
    name: str, width: int, layers: int, tokens: int, device: torch.device
) -> Callable[[], None]:
    torch.manual_seed(0)
    config = BitNetConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=tokens,
        bos_token_id=0, eos_token_id=1, attention="full", reversible=name == "reversible",
        use_cache=False,
    )  # fmt: skip
    model = BitNetForCausalLM(config).to(device).train()
    if name == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(256, (1, tokens), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def reversible_command(
    width: Annotated[int, typer.Option(help="Of the hidden states.")] = 256,
    tokens: Annotated[int, typer.Option(help="Of the one text of a step.")] = 1024,
    rounds: Annotated[int, typer.Option(help="How many steps of each are timed.")] = 6,
    device: Device = "cpu",
    output: Output = None,
) -> None:
    """Compare a training step with reversible layers, with checkpoints, and with neither.

    Ternary masters in float32, full attention, at 4, 8 and 16 layers.
    """
    settings = read_settings(device, rounds, 1.0, quick=False)
    torch.set_num_threads(settings.threads)
    rows = measure(width, tokens, rounds, settings.device)
    path: Path = target("reversible", output, False)
    write_json(
        {
            "case": "reversible",
            "command": command_line(),
            "width": width,
            "tokens": tokens,
            "threads": settings.threads,
            "machine": describe_machine(settings.device),
            "software": describe_software(settings.device),
            "rows": rows,
        },
        path,
    )
    console.print(_table(rows))
    console.print(f"wrote {escape(shown(path))}")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("layers", "", "activations", "median step", "times plain")
    for row in rows:
        table.add_row(
            str(row["layers"]), LABELS[row["provider"]], size(row["activation_bytes"]),
            f"{1e3 * median(row['seconds']):.0f} ms", f"{row['times_plain']:.2f}",
        )  # fmt: skip
    return table
