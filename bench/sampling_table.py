"""The tables of docs/sampling.md, out of results of ``python -m bench sampling``.

python -m bench.sampling_table bench/results/sampling.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def markdown(data: dict[str, Any]) -> str:
    """Return the steps of a result beside dense ones, a line for each provider.

    Of several lengths: the share of rows and the error at the longest one that has 98304 tokens at
    most, and for each length how many times as fast as dense, with the byte bound in brackets. Of
    one length: more of it.
    """
    timed = [row for row in data["rows"] if row["status"] == "timed"]
    lengths = sorted({row["point"]["T"] for row in timed})
    by_provider: dict[str, dict[int, dict[str, Any]]] = {}
    for row in timed:
        by_provider.setdefault(row["provider"], {})[row["point"]["T"]] = row
    dense = by_provider.pop("dense")
    steps = ", ".join(f"{dense[T]['seconds']['median'] * 1e3:.2g}" for T in lengths)
    told = max((T for T in lengths if T <= 98304), default=lengths[0])
    lines = _one(by_provider, told) if len(lengths) == 1 else _several(by_provider, lengths, told)
    names = ", ".join(str(T) for T in lengths)
    return "\n".join([f"dense, {names} tokens: {steps} ms", "", *lines])


def _one(by_provider: dict[str, dict[int, dict[str, Any]]], T: int) -> list[str]:
    lines = ["| | rows | error | times dense | byte bound | tables |", "|" + " --- |" * 6]
    for row in (at[T] for at in by_provider.values()):
        told, ratio = row["details"], row["ratios"]["dense"]
        spread = f"{_times(ratio['median'])} ({_times(ratio['p20'])} to {_times(ratio['p80'])})"
        lines.append(
            f"| {row['label']} | {told['rows_share']:.1%} | {told['error']:.2f} | {spread} "
            f"| {_times(told['most_speedup'])} | {told['table_bytes'] / 1e6:.0f} MB |"
        )
    return lines


def _several(
    by_provider: dict[str, dict[int, dict[str, Any]]], lengths: list[int], told: int
) -> list[str]:
    head = [f"rows, {told}", "error", *(str(T) for T in lengths)]
    lines = ["| | " + " | ".join(head) + " |", "|" + " --- |" * (len(head) + 1)]
    for at in by_provider.values():
        details = at[told]["details"]
        cells = [f"{details['rows_share']:.1%}", f"{details['error']:.2f}"]
        for T in lengths:
            bound = _times(at[T]["details"]["most_speedup"])
            cells.append(f"{_times(at[T]['ratios']['dense']['median'])} ({bound})")
        lines.append(f"| {at[told]['label']} | " + " | ".join(cells) + " |")
    return lines


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


if __name__ == "__main__":
    for path in sys.argv[1:] or ["bench/results/sampling.json"]:
        print(markdown(json.loads(Path(path).read_text(encoding="utf-8"))))
