"""``calibrate``: which layers have to stay full, found by changing one layer at a time.

The idea of arXiv:2606.27791: a model that reads with full attention predicts the answers of some
documents; a layer whose attention is changed moves these predictions, the more the more the model
needs that layer to see everything. The layers that move them most stay full.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.attention.registry import parse_mode
from bitnet_triton.models import BitNetConfig, BitNetForCausalLM, set_attention
from bitnet_triton.training.documents import Document, read_lines
from bitnet_triton.training.gather import Tell, gather_documents
from bitnet_triton.training.jobs import Calibration
from bitnet_triton.training.options import remember, write_whole
from bitnet_triton.training.packing import IGNORED
from bitnet_triton.training.results import Store
from bitnet_triton.training.settings import parse_setting
from bitnet_triton.training.subject import digest, folder_of
from bitnet_triton.training.trainee import device

_POSITIONS = 256  # whose predictions over the vocabulary are in memory at a time
FULL = parse_mode("full")

# Maps what is measured, and plans by their full layers, to the harm of each
Measure = Callable[[str, Sequence[frozenset[int]]], list[float]]


def calibrate(job: Calibration, progress: Tell | None = None) -> dict[str, Any]:
    """Find the layers of a model that have to stay full, and write a plan that keeps them so.

    The harm of a plan is the divergence (Kullback-Leibler, nats per token) of its predictions from
    those of the model with full attention, at the answers of the documents, or at all tokens of
    those that are text alone; every document counts the same. Each layer is changed alone, and the
    most harmed ones stay full. Plans by rule with as many full layers (every second one, from each
    first one) are measured beside; ``attention.json`` in ``output`` gets the least harmful of all.
    ``BitNetForCausalLM.from_pretrained`` takes its content, and the commands that have
    ``--attention`` its path. The same call goes on where a killed one was.

    Args:
        job: what is to be done.
        progress: told how far it is.

    Returns:
        What ``report.json`` in ``output`` has: ``layers``, for each the harm of changing it alone;
        ``plans``, for each its full layers, its harm and its attention; ``chosen``, the name of one
        of them; and ``attention``, what was written.

    Raises:
        ValueError: the model does not attend so, the data are not as they should be, there are not
            as many layers as ``full_layers`` asks for, or ``output`` holds another run.
    """
    tell = progress or (lambda *args: None)
    lines = [] if job.data == "tasks" else read_lines(job.data)
    with folder_of(job.model) as base:
        target = _Target(job, BitNetConfig.from_pretrained(base))
        output = Path(job.output)
        whole = {"model": digest(base), "attention": target.config(())}  # no names of files
        run = {**dataclasses.asdict(job), **whole}
        remember(output, run)
        drawn, _, answers = gather_documents(job, base, lines, output, tell)
        documents = [d for d in drawn if any(label != IGNORED for label in d["labels"][1:])]
        if not documents:
            raise ValueError("`data`: expected documents with tokens to predict, got none")
        harms = _Harms(base, target, documents, Store(output / "harms", run), tell)
        report = {"run": dataclasses.asdict(job), "documents": len(documents), "answers": answers}
        report |= _choose(job, target, harms)
    write_whole(output / "attention.json", json.dumps(report["attention"], indent=1) + "\n")
    write_whole(output / "report.json", json.dumps(report, indent=1) + "\n")
    return report


class _Target:
    """What layers are changed to, and the plans in which some of them are not.

    Args:
        job: says what it is.
        config: of the model.

    Attributes:
        layers: how many the model has.
        everything: all of them.
        changeable: layers that are not full anyhow.
        count: how many layers stay full.
    """

    def __init__(self, job: Calibration, config: BitNetConfig) -> None:
        value: Any = parse_setting(job.attention).attention
        if value is None:
            raise ValueError("`attention`: expected what to change layers to, got 'checkpoint'")
        # which layers are full is what is looked for
        self._preset = {**value, "full_layers": []} if "preset" in value else None
        self.layers = config.num_hidden_layers
        self.everything = frozenset(range(self.layers))
        self._plan = AttentionPlan.from_config(self._preset or value, self.layers)
        self._plan.check_layers(self.layers)
        for mode in self._plan:
            if mode.module(config) is not None:
                raise ValueError(
                    f"`attention`: {mode.name!r} brings weights of its own, which have to be "
                    "trained before layers can be compared"
                )
        if job.length > config.max_position_embeddings:
            most = config.max_position_embeddings
            raise ValueError(f"`length`: expected up to {most}, got {job.length}")
        self.changeable = [i for i in range(self.layers) if set(self._plan.modes(i)) != {FULL}]
        self.count = job.count(self.layers)
        fixed = self.layers - len(self.changeable)
        if not fixed <= self.count < self.layers:
            raise ValueError(
                f"`full_layers`: expected {fixed} to {self.layers - 1} of {self.layers} layers, "
                f"got {self.count}"
            )

    def config(self, full: Iterable[int]) -> dict[str, Any]:
        """Return ``config.attention`` with these layers full."""
        chosen = sorted(full)
        if self._preset is not None:
            return {**self._preset, "full_layers": chosen}
        phases = zip(*(self._modes(i, i in chosen) for i in range(self.layers)))
        return AttentionPlan(*(tuple(modes) for modes in phases)).to_config()

    def _modes(self, layer: int, is_full: bool) -> tuple[Any, Any]:
        return (FULL, FULL) if is_full else self._plan.modes(layer)

    def rules(self) -> dict[str, frozenset[int]]:
        """Return plans with every so many layers full, as many as asked for."""
        found: dict[frozenset[int], str] = {}
        share = self.layers / self.count if self.count else 0
        for step in {math.floor(share), math.ceil(share)} - {0, 1}:
            for first in range(step):
                full = frozenset(range(first, self.layers, step))
                if len(full) == self.count and full >= self.everything - set(self.changeable):
                    found.setdefault(full, f"every {step} from {first}")
        return {name: full for full, name in found.items()}


class _Harms:
    """Measures how far plans move the predictions of a model, each of them once.

    Args:
        base: folder of the model.
        target: makes plans.
        documents: whose labels say where predictions count.
        store: keeps what was measured.
        tell: told how far it is.
    """

    def __init__(
        self, base: str, target: _Target, documents: list[Document], store: Store, tell: Tell
    ) -> None:
        self.target, self.documents, self.store, self.tell = target, documents, store, tell
        self._base = base
        self._known = {frozenset(line["full"]): line["harm"] for line in store.lines}
        self._model: Any = None
        self._whole: list[Tensor] = []

    def __call__(self, what: str, plans: Sequence[frozenset[int]]) -> list[float]:
        """Return the harm of plans with these layers full."""
        for number, full in enumerate(plans):
            if full not in self._known:
                harm = self._measure(full)
                self.store.add({"full": sorted(full), "harm": harm})
                self._known[full] = harm
            self.tell(what, number + 1, len(plans), float("nan"))
        return [self._known[full] for full in plans]

    def _measure(self, full: frozenset[int]) -> float:
        if self._model is None:
            model: Any = BitNetForCausalLM.from_pretrained(self._base, attention="full", fuse=False)
            self._model = model.eval().to(device())
            for number, document in enumerate(self.documents):
                self._whole.append(self._read(document))
                self.tell("full attention", number + 1, len(self.documents), float("nan"))
        set_attention(self._model, self.target.config(full))
        found = [self._divergence(d, whole) for d, whole in zip(self.documents, self._whole)]
        return sum(found) / len(found)

    def _read(self, document: Document) -> Tensor:
        """Return what a model makes of the tokens before those that count, [N D]."""
        ids = torch.tensor([document["input_ids"]], device=self._model.device)
        labels = torch.tensor(document["labels"][1:], device=self._model.device)
        with torch.inference_mode():
            hidden = self._model.model(
                ids, use_cache=False, prompt_len=document["prompt_len"]
            ).last_hidden_state
        return hidden[0, :-1][labels != IGNORED]

    def _divergence(self, document: Document, whole: Tensor) -> float:
        total = 0.0
        with torch.inference_mode():
            changed = self._read(document)
            for pair in zip(whole.split(_POSITIONS), changed.split(_POSITIONS)):
                p, q = (self._model.lm_head(part).float().log_softmax(-1) for part in pair)
                total += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
        return total / len(whole)


def _choose(job: Calibration, target: _Target, harms: Measure) -> dict[str, Any]:
    """Measure layers and plans, and choose the plan that harms least."""
    everything, count = target.everything, target.count
    alone = harms("one layer", [everything - {i} for i in target.changeable])
    if not any(alone):
        raise ValueError(
            f"`attention`: as good as full attention on documents of up to {job.length} tokens; "
            "choose longer ones, or less that a token sees"
        )
    harms_alone = dict(zip(target.changeable, alone))
    fixed = everything - set(harms_alone)
    by_harm = sorted(harms_alone, key=lambda i: (-harms_alone[i], i))
    plans = {"most harmed": fixed | set(by_harm[: count - len(fixed)])}
    plans |= target.rules()
    found = harms("plans", [*plans.values(), fixed])
    chosen = min(plans, key=dict(zip(plans, found)).__getitem__)
    told = [*plans.items(), ("no other layer" if fixed else "no layer", fixed)]
    return {
        "layers": [{"layer": i, "harm": harms_alone[i]} for i in by_harm],
        "plans": {
            name: {"full": sorted(full), "harm": harm, "attention": target.config(full)}
            for (name, full), harm in zip(told, found)
        },
        "chosen": chosen,
        "attention": target.config(plans[chosen]),
    }
