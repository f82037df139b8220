"""Reformer's copy task: train one layer on 0w0w, and run it with other numbers of hash rounds.

python examples/train_reformer.py                                        # minutes on a CPU
python examples/train_reformer.py --length 511 --symbols 127 --width 256 --window 64   # the paper's

Sequences are 0w0w, with w of random symbols; the second half is predicted. Rotations are drawn anew
in every step of training (arXiv:2001.04451, table 2, has accuracies of 78 to 100 %).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_triton.kernels import lsh_attention

EVALUATED = (1, 2, 4, 8)


class CopyModel(nn.Module):
    """Embeddings, one layer of shared-QK attention inside of buckets, and a head."""

    def __init__(self, symbols: int, length: int, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        tokens = 2 * length + 2
        self.buckets = max(2 * (tokens // window), 2)  # the paper's 2 T / chunk
        self.embed = nn.Embedding(symbols + 1, width)
        self.place = nn.Parameter(torch.randn(tokens, width))
        self.qk = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols + 1)

    def forward(self, ids: Tensor, rounds: int, seed: int) -> Tensor:
        """Map ids [B T] to logits [B T symbols + 1]."""
        x = self.embed(ids) + self.place[: ids.shape[1]]
        qk, v = (t.unflatten(-1, (self.heads, -1)) for t in (self.qk(x), self.v(x)))
        out = lsh_attention(
            qk, v, rounds=rounds, buckets=self.buckets, window=self.window, seed=seed
        )
        return self.head(self.norm(x + self.o(out.flatten(2))))


def draw(batch: int, length: int, symbols: int, generator: torch.Generator) -> Tensor:
    """Return sequences 0w0w, int64 [batch, 2 length + 2]."""
    w = torch.randint(1, symbols + 1, (batch, length), generator=generator)
    half = F.pad(w, (1, 0))
    return torch.cat([half, half], 1)


def halves(model: CopyModel, ids: Tensor, rounds: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the logits of the second w and what they should be."""
    length = ids.shape[1] // 2 - 1
    logits = model(ids[:, :-1], rounds, seed)[:, -length:]
    return logits, ids[:, -length:]


def train(options: argparse.Namespace, rounds: int) -> CopyModel:
    """Train a model with so many rounds."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = CopyModel(options.symbols, options.length, options.width, options.heads, options.window)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps + 1)
    for step in range(options.steps):
        ids = draw(options.batch, options.length, options.symbols, generator)
        logits, wanted = halves(model, ids, rounds, seed=step)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"trained with {rounds} rounds, step {step + 1}: loss {loss:.3f}", flush=True)
    return model


@torch.no_grad()
def accuracy(model: CopyModel, options: argparse.Namespace, rounds: int) -> float:
    """Return the share of symbols that are right, over fresh sequences and rotations."""
    generator, right = torch.Generator().manual_seed(2), []
    for batch in range(8):
        ids = draw(options.batch, options.length, options.symbols, generator)
        logits, wanted = halves(model, ids, rounds, seed=10**6 + batch)
        right.append((logits.argmax(-1) == wanted).float().mean())
    return torch.stack(right).mean().item()


def main(arguments: list[str] | None = None) -> dict[int, list[float]]:
    """Train with each number of rounds, and return accuracies by it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {
        "length": 63, "symbols": 31, "width": 128, "heads": 4, "window": 16, "batch": 16,
        "steps": 600,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args(arguments)
    results = {}
    for rounds in options.rounds:
        model = train(options, rounds).eval()
        results[rounds] = [accuracy(model, options, n) for n in EVALUATED]
    print("trained with | evaluated with " + " | ".join(f"{n:>6}" for n in EVALUATED))
    for rounds, found in results.items():
        print(f"{rounds:>12} |                " + " | ".join(f"{100 * a:5.1f}%" for a in found))
    return results


if __name__ == "__main__":
    main()
