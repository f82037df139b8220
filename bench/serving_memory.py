"""The command ``serving_memory``: what a server holds after thousands of short requests.

The server runs in a process of its own, as ``bitnet-triton serve`` starts it, and is asked by
OpenAI's client. Each request has a prompt of its own, so that pages, prefixes and the lists of the
engine turn over; its resident size is read between requests.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from bench.machine import command_line, describe_machine, describe_software
from bench.options import Output, target
from bench.report import size, write_json
from bench.run import console, shown

POINTS = 20  # how often the size is read
WORDS = ("def", "class", "return", "import", "for", "while", "list", "dict", "self", "key", "value")


@contextmanager
def serve(threads: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server of the embedded model, and yield its process and address."""
    code = "from bitnet_triton.cli import main; main()"
    options = ["serve", "--port", "0", "--threads", str(threads)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "Serving" in line)
        yield process, line.split(" at ")[1].strip()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()


def ask(client: Any, number: int) -> int:
    """Send one request, and return how many tokens its answer has."""
    drawn = random.Random(number)
    prompt = " ".join(drawn.choices(WORDS, k=drawn.randint(4, 24)))
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=drawn.randint(1, 8), temperature=0
    )
    return int(answer.usage.completion_tokens)


def measure(requests: int, together: int, threads: int) -> list[dict[str, Any]]:
    """Return the resident bytes of a server, and its open files, after so many requests."""
    import openai
    import psutil

    rows = []
    with (
        serve(threads) as (process, url),
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(together) as pool,
    ):
        watched = psutil.Process(process.pid)
        begin, tokens = perf_counter(), 0
        for point in track(range(POINTS + 1), "requests", console=console, transient=True):
            first, last = (max(n, 0) * requests // POINTS for n in (point - 1, point))
            tokens += sum(pool.map(lambda number: ask(client, number), range(first, last)))
            rows.append(
                {
                    "requests": last,
                    "tokens": tokens,
                    "seconds": perf_counter() - begin,
                    "resident_bytes": watched.memory_info().rss,
                    "open_files": watched.num_fds(),
                }
            )
    return rows


def serving_memory_command(
    requests: Annotated[int, typer.Option(help="How many, of up to 8 tokens.", min=POINTS)] = 10000,
    together: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 32,
    threads: Annotated[int, typer.Option(help="CPU threads of the server.", min=1)] = 1,
    output: Output = None,
) -> None:
    """Send thousands of short requests to a server, and read how much memory it holds.

    Needs pip install bitnet-triton[serve], openai and psutil.
    """
    rows = measure(requests, together, threads)
    device = torch.device("cpu")
    path: Path = target("serving_memory", output, False)
    write_json(
        {
            "case": "serving_memory", "command": command_line(), "together": together,
            "threads": threads, "machine": describe_machine(device),
            "software": describe_software(device), "rows": rows,
        },
        path,
    )  # fmt: skip
    table = Table("requests", "tokens", "resident", "open files")
    for row in rows:
        table.add_row(
            str(row["requests"]), str(row["tokens"]), size(row["resident_bytes"]),
            str(row["open_files"]),
        )  # fmt: skip
    console.print(table)
    console.print(f"wrote {escape(shown(path))}")
