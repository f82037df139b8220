"""How far from dense attention what reads few rows ends up, by the rows that it reads.

Synthetic keys are those of the case ``sampling``; real ones are recorded from the recall model,
where the last token of a prompt asks for its answer. Exact top-k and pages (Quest) read what they
take to be the best rows and drop all others; sampling estimates. Every point is the mean over
queries, and over seeds where a method draws.

python -m bench.sampling_errors    # writes bench/results/sampling_errors.json, and a PNG beside it
python -m bench.sampling_errors --spread    # sampling_spread.json: heads by how far they spread
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.case import Settings
from bench.cases.sampling import make_inputs
from bench.machine import command_line, describe_machine, describe_software
from bench.report import write_json
from bitnet_triton import RECALL_MODEL, BitNetForCausalLM
from bitnet_triton.attention.modes.full import Full
from bitnet_triton.kernels import (
    HashTables,
    SignCodes,
    lsh_sampling_attention,
    pool_keys,
    top_blocks,
    verified_sampling_attention,
)
from bitnet_triton.kernels.lsh_sampling.verified import units_of
from bitnet_triton.training.answers import make_prompts
from bitnet_triton.training.tasks.registry import TASKS
from bitnet_triton.training.tasks.tokens import TextTokens

SEEDS = 3
PAGE, SINKS, RECENT = 16, 4, 32
PROMPTS = ("needle", "recall", "tracking", "frequent_words")
SHARES = (0.01, 0.02, 0.05, 0.1)
# bits and tables
HASHES = ((10, 100), (10, 150), (9, 120), (8, 75), (8, 120), (7, 75))
EPSILONS = (0.8, 0.4, 0.2, 0.1)
# of all rows, over how many the weights of a head are spread
SPREADS = ((0.0, 0.01), (0.01, 0.1), (0.1, 0.3), (0.3, 1.0))


@dataclass(frozen=True)
class Query:
    """One query of each head, [1 1 H D], and its keys and values [1 T Hk D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def tokens(self) -> int:
        """T."""
        return self.k.shape[1]

    def attend(self, chosen: Tensor) -> Tensor:
        """Attend with each head to the rows that bool [H T] chooses, in float32."""
        group = self.q.shape[2] // self.k.shape[2]
        k, v = (t[0].float().repeat_interleave(group, 1) for t in (self.k, self.v))
        scores = torch.einsum("hd,thd->ht", self.q[0, 0].float(), k) * self.scale
        weights = scores.masked_fill(~chosen, float("-inf")).softmax(-1)
        return torch.einsum("ht,thd->hd", weights, v)


def forced(T: int) -> Tensor:
    """Return which rows every method reads, bool [T]."""
    rows = torch.arange(T)
    return (rows < SINKS) | (rows >= T - RECENT)


def by_top_k(query: Query, share: float) -> Iterator[tuple[Tensor, float]]:
    """Read the best rows of each head."""
    group = query.q.shape[2] // query.k.shape[2]
    k = query.k[0].repeat_interleave(group, 1)
    scores = torch.einsum("hd,thd->ht", query.q[0, 0].float(), k.float())
    scores[:, forced(query.tokens)] = float("inf")
    count = max(round(share * query.tokens), SINKS + RECENT)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(count).indices, True)
    yield query.attend(chosen), count


def by_pages(query: Query, share: float) -> Iterator[tuple[Tensor, float]]:
    """Read the pages with the best bounds, the same ones for the heads of a group."""
    bounds, T = pool_keys(query.k, units=units_of(PAGE)), query.tokens
    pages = top_blocks(
        query.q, bounds, block=PAGE, selected=max(round(share * T / PAGE), 4), initial=1,
        local=RECENT // PAGE + 1, units=units_of(PAGE), sets=query.k.shape[2], tokens=T,
    )[0, 0]  # fmt: skip
    number = torch.arange(T) // PAGE
    chosen = torch.stack([torch.isin(number, own) for own in pages])
    heads = chosen.repeat_interleave(query.q.shape[2] // query.k.shape[2], 0)
    yield query.attend(heads), chosen.sum(-1).double().mean().item()


def by_hashes(query: Query, budget: tuple[int, int], share: str) -> Iterator[tuple[Tensor, float]]:
    """Sample by hash tables, with other planes each time."""
    for seed in range(SEEDS):
        tables = HashTables.build(query.k, bits=budget[0], tables=budget[1], seed=seed)
        out, _ = lsh_sampling_attention(
            query.q, query.k, query.v, tables, sinks=SINKS, recent=RECENT, share=share,
            scale=query.scale,
        )  # fmt: skip
        read = tables.sampled(query.q, share=share)[0] | forced(query.tokens)
        yield out[0, 0], read.sum(-1).double().mean().item()


def by_errors(query: Query, epsilon: float, find: str) -> Iterator[tuple[Tensor, float]]:
    """Sample as many rows as the error asks for, beside a fiftieth of them in pages."""
    local, base = RECENT // PAGE + 1, 64
    selected = 1 + local + query.tokens // 50 // PAGE
    signs = SignCodes.build(query.k) if find == "signs" else None
    for seed in range(SEEDS):
        out, _, drawn = verified_sampling_attention(
            query.q, query.k, query.v, epsilon=epsilon, delta=0.1, page=PAGE, selected=selected,
            initial=1, local=local, base=base, seed=seed, scale=query.scale,
            signs=signs,
        )  # fmt: skip
        # of the rows that tell the spread only keys are read
        yield out[0, 0], selected * PAGE + base / 2 + drawn.double().mean().item()


METHODS: dict[str, tuple[Callable[..., Iterator[tuple[Tensor, float]]], tuple]] = {
    "exact top-k": (by_top_k, SHARES),
    "pages (quest)": (by_pages, SHARES),
    "lsh_sampling own": (lambda q, b: by_hashes(q, b, "own"), HASHES),
    "lsh_sampling proposal": (lambda q, b: by_hashes(q, b, "proposal"), HASHES),
    "verified_sampling": (lambda q, e: by_errors(q, e, "bounds"), EPSILONS),
    "verified, by signs": (lambda q, e: by_errors(q, e, "signs"), EPSILONS),
}


def spread(query: Query) -> Tensor:
    """Return over what share of the rows each head spreads: by the entropy of its weights, [H]."""
    group = query.q.shape[2] // query.k.shape[2]
    k = query.k[0].float().repeat_interleave(group, 1)
    scores = torch.einsum("hd,thd->ht", query.q[0, 0].float(), k) * query.scale
    entropy = -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1)
    return entropy.exp() / query.tokens


def errors_of_heads(query: Query) -> Iterator[tuple[str, Any, Tensor, Tensor]]:
    """Yield method, setting, and of each head its error and the rows it has read, as a share."""
    dense = query.attend(torch.ones(query.q.shape[2], query.tokens).bool())

    def error(out: Tensor) -> Tensor:
        return (out.float() - dense).norm(dim=-1) / dense.norm(dim=-1)

    for share in SHARES:
        for out, read in by_top_k(query, share):
            yield "exact top-k", share, error(out), torch.full(out.shape[:1], read / query.tokens)
    for budget in HASHES[1:4]:  # one draw: heads are many
        tables = HashTables.build(query.k, bits=budget[0], tables=budget[1])
        out, _ = lsh_sampling_attention(
            query.q, query.k, query.v, tables, sinks=SINKS, recent=RECENT, scale=query.scale
        )
        read = (tables.sampled(query.q)[0] | forced(query.tokens)).double().mean(-1)
        yield "lsh_sampling own", budget, error(out[0, 0]), read


def measure_spread(queries: list[Query]) -> list[dict[str, Any]]:
    """Return a row for each share that heads spread over, method and setting."""
    found: dict[tuple, list[tuple[float, float]]] = {}
    for query in queries:
        shares = spread(query).tolist()
        for method, setting, errors, reads in errors_of_heads(query):
            for share, error, read in zip(shares, errors.tolist(), reads.tolist()):
                if math.isnan(error):
                    continue  # a head whose values are all zero
                kind = next(kind for kind in SPREADS if kind[0] <= share <= kind[1])
                found.setdefault((kind, method, setting), []).append((error, read))
    rows = []
    for (kind, method, setting), values in sorted(found.items(), key=str):
        error, read = (sum(column) / len(values) for column in zip(*values))
        name = f"spread over {100 * kind[0]:.0f} to {100 * kind[1]:.0f} %"
        told = {"keys": name, "method": method, "setting": setting, "heads": len(values)}
        rows.append({**told, "rows_share": read, "error": error})
        print(f"{name:22} {method:17} {setting!s:10} {100 * read:5.1f} % {error:.3f} {len(values)}")
    return rows


def synthetic(T: int) -> list[Query]:
    """Return queries of the case ``sampling``."""
    inputs = make_inputs(T, 20, 5, 128, Settings())
    return [Query(q, inputs.k, inputs.v, inputs.scale) for q in inputs.queries[:3]]


def recorded(task: str, T: int, prompts: int) -> list[Query]:
    """Record what the layers of the recall model attend with at the end of prompts."""
    from transformers import AutoTokenizer

    model = BitNetForCausalLM.from_pretrained(RECALL_MODEL, attention="full").eval()
    tokens, queries = TextTokens(AutoTokenizer.from_pretrained(RECALL_MODEL)), []
    attend = Full.__call__

    def record(mode: Full, q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
        scale = q.shape[-1] ** -0.5 if context.scale is None else context.scale
        queries.append(Query(q[:, -1:], k[:, : q.shape[1]], v[:, : q.shape[1]], scale))
        return attend(mode, q, k, v, context)

    with torch.no_grad(), patch.object(Full, "__call__", record):
        for prompt in make_prompts(task, TASKS[task], tokens, T, prompts, (0.3, 0.6), 11):
            ids = torch.tensor([prompt.context + prompt.turns[0].question])
            model(ids, use_cache=False, logits_to_keep=1)
    return queries


def measure(name: str, queries: list[Query]) -> list[dict[str, Any]]:
    """Return a row for each method and setting."""
    rows = []
    for method, (run, settings) in METHODS.items():
        for setting in settings:
            errors, shares = [], []
            for query in queries:
                dense = query.attend(torch.ones(query.q.shape[2], query.tokens).bool())
                for out, read in run(query, setting):
                    errors.append(((out.float() - dense).norm() / dense.norm()).item())
                    shares.append(read / query.tokens)
            means = (sum(values) / len(values) for values in (errors, shares))
            error, share = means
            told = {"keys": name, "method": method, "setting": setting}
            rows.append({**told, "rows_share": share, "error": error})
            print(f"{name:18} {method:22} {setting!s:12} {100 * share:5.1f} % {error:.3f}")
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot error over rows read: a panel for each kind of keys."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["keys"] for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.6), sharey=True)
    for axes, name in zip(panels, names):
        for method in METHODS:
            own = [row for row in rows if (row["keys"], row["method"]) == (name, method)]
            own.sort(key=lambda row: row["rows_share"])
            x, y = ([row[key] for row in own] for key in ("rows_share", "error"))
            axes.plot([100 * share for share in x], y, marker="o", ms=3, lw=1.2, label=method)
        axes.set(xscale="log", yscale="log", title=name, xlabel="rows read, %")
        axes.grid(alpha=0.3, which="both", lw=0.4)
    panels[0].set_ylabel("relative RMS error against dense")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, help="JSON; in bench/results without it")
    parser.add_argument("--spread", action="store_true", help="recorded heads by their entropy")
    parser.add_argument("--tokens", type=int, default=4096, help="of the real prompts")
    parser.add_argument("--synthetic", type=int, default=16384, help="keys of the synthetic ones")
    parser.add_argument("--prompts", type=int, default=3, help="of each task")
    given = parser.parse_args()
    name = "sampling_spread" if given.spread else "sampling_errors"
    output = given.output or Path(f"bench/results/{name}.json")
    if given.spread:
        rows = measure_spread(
            [q for task in PROMPTS for q in recorded(task, given.tokens, given.prompts)]
        )
    else:
        rows = measure(f"synthetic, {given.synthetic}", synthetic(given.synthetic))
        for task in PROMPTS:
            rows += measure(task, recorded(task, given.tokens, given.prompts))
    device = torch.device("cpu")
    write_json(
        {
            "case": name, "command": command_line(), "rows": rows,
            "machine": describe_machine(device), "software": describe_software(device),
        },
        output,
    )  # fmt: skip
    draw(rows, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
