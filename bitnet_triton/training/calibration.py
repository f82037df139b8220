"""``calibrate``: which layers have to stay full, found by changing one layer at a time.

The idea of arXiv:2606.27791: a model answers what some documents ask; where a layer's attention is
changed, the answers become less probable, the more the more the model needs that layer to see
everything. The layers that cost most stay full. Probabilities are compared rather than their
logarithms: an answer that the model does not know costs it many nats, a few more or less by chance.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_triton.attention import AttentionPlan
from bitnet_triton.attention.registry import parse_mode
from bitnet_triton.models import BitNetConfig, BitNetForCausalLM, set_attention
from bitnet_triton.training.documents import Document, read_lines
from bitnet_triton.training.gather import Tell, check_room, data_of, gather_documents
from bitnet_triton.training.jobs import Calibration
from bitnet_triton.training.options import remember, write_whole
from bitnet_triton.training.packing import IGNORED
from bitnet_triton.training.results import Store
from bitnet_triton.training.settings import parse_setting
from bitnet_triton.training.subject import digest, folder_of
from bitnet_triton.training.trainee import device

_POSITIONS = 256  # whose predictions over the vocabulary are in memory at a time
FULL = parse_mode("full")


def calibrate(job: Calibration, progress: Tell | None = None) -> dict[str, Any]:
    """Find the layers of a model that have to stay full, and write a plan that keeps them so.

    The harm of a plan is by how much less probable the right tokens of the answers become beside
    full attention, or all tokens of documents that are text alone; every document counts the same.
    Each layer is changed alone, and the most harmed ones stay full. Plans by rule with as many full
    layers (every second one, from each first one) are measured beside; ``attention.json`` in
    ``output`` gets the least harmful of all.
    ``BitNetForCausalLM.from_pretrained`` takes its content, and the commands that have
    ``--attention`` its path. The same call goes on where a killed one was.

    Args:
        job: what is to be done.
        progress: told how far it is.

    Returns:
        What ``report.json`` in ``output`` has: ``missed`` and ``loss``, the ``Cost`` with full
        attention; ``layers``, for each the harm of changing it alone; ``plans``, for each its full
        layers, its harm and its attention; ``chosen``, the name of one of them; and ``attention``,
        what was written. Beside a harm stand its standard error, by how much documents differ, and
        what is added to the loss, in nats a token.

    Raises:
        ValueError: the model does not attend so, the data are not as they should be, there are not
            as many layers as ``full_layers`` asks for, or ``output`` holds another run.
    """
    tell = progress or (lambda *args: None)
    lines = [] if job.data == "tasks" else read_lines(job.data)
    with folder_of(job.model) as base:
        target = _Target(job, BitNetConfig.from_pretrained(base))
        check_room(job, base)
        output = Path(job.output)
        known = {"model": digest(base), "attention": target.config(()), "data": data_of(job, lines)}
        run = {**dataclasses.asdict(job), **known, "measure": "probability"}  # no names of files
        remember(output, run)
        drawn, _, answers = gather_documents(job, base, lines, output, tell)
        documents = [d for d in drawn if any(label != IGNORED for label in d["labels"][1:])]
        if not documents:
            raise ValueError("`data`: expected documents with tokens to predict, got none")
        harms = _Harms(base, target, documents, Store(output / "harms", run), tell)
        missed, losses = zip(*harms.whole)
        report = {
            "run": dataclasses.asdict(job), "documents": len(documents), "answers": answers,
            "missed": statistics.fmean(missed), "loss": statistics.fmean(losses),
            **_choose(job, target, harms),
        }  # fmt: skip
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
        if all(mode.sees_all_of(job.length) for mode in self._plan):
            raise ValueError(
                f"`attention`: as good as full attention on documents of up to {job.length} tokens "
                "(`length`); lower its `window`, as in swaa-trained:window=256, or raise `length`"
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


class Cost(NamedTuple):
    """What answers cost a model, as means over their tokens.

    Attributes:
        missed: how far the probability of the right token falls short of 1: the share that is
            missed where tokens are drawn.
        loss: cross-entropy in nats.
    """

    missed: float
    loss: float


# Maps what is measured, and plans by their full layers, to what each adds, document by document
Measure = Callable[[str, Sequence[frozenset[int]]], list[list[Cost]]]


class _Harms:
    """Measures what plans cost the answers of a model, each of them once.

    Args:
        base: folder of the model.
        target: makes plans.
        documents: whose labels are the answers.
        store: keeps what was measured.
        tell: told how far it is.
    """

    def __init__(
        self, base: str, target: _Target, documents: list[Document], store: Store, tell: Tell
    ) -> None:
        self.target, self.documents, self.store, self.tell = target, documents, store, tell
        self._base = base
        self._known = {
            frozenset(line["full"]): [Cost(*cost) for cost in line["costs"]] for line in store.lines
        }
        self._model: Any = None

    @property
    def whole(self) -> list[Cost]:
        """What full attention costs, document by document."""
        return self._costs(self.target.everything)

    def __call__(self, what: str, plans: Sequence[frozenset[int]]) -> list[list[Cost]]:
        """Return what plans with these layers full add to that."""
        found = []
        for number, full in enumerate(plans):
            pairs = zip(self._costs(full), self.whole)
            found.append([Cost(*(a - b for a, b in zip(*pair))) for pair in pairs])
            self.tell(what, number + 1, len(plans), float("nan"))
        return found

    def _costs(self, full: frozenset[int]) -> list[Cost]:
        if full not in self._known:
            costs = self._measure(full)
            self.store.add({"full": sorted(full), "costs": costs})
            self._known[full] = costs
        return self._known[full]

    def _measure(self, full: frozenset[int]) -> list[Cost]:
        if self._model is None:
            model: Any = BitNetForCausalLM.from_pretrained(self._base, attention="full", fuse=False)
            self._model = model.eval().to(device())
        is_whole = full == self.target.everything
        set_attention(self._model, "full" if is_whole else self.target.config(full))
        return answer_costs(self._model, self.documents)


def answer_costs(model: BitNetForCausalLM, documents: Sequence[Document]) -> list[Cost]:
    """Return what the tokens that count cost, document by document.

    Args:
        model: in evaluation mode; attends by its own plan.
        documents: as ``load_documents`` gives them.
    """
    return [_cost(model, document) for document in documents]


@torch.inference_mode()
def _cost(model: Any, document: Document) -> Cost:
    ids = torch.tensor([document["input_ids"]], device=model.device)
    labels = torch.tensor(document["labels"][1:], device=model.device)
    counts = labels != IGNORED
    prompt_len = document["prompt_len"]
    hidden = model.model(ids, use_cache=False, prompt_len=prompt_len).last_hidden_state
    parts = zip(hidden[0, :-1][counts].split(_POSITIONS), labels[counts].split(_POSITIONS))
    losses: list[Tensor] = [
        F.cross_entropy(model.lm_head(part).float(), wanted, reduction="none")
        for part, wanted in parts
    ]
    loss = torch.cat(losses).double()
    return Cost((1 - (-loss).exp()).mean().item(), loss.mean().item())


def _choose(job: Calibration, target: _Target, harms: Measure) -> dict[str, Any]:
    """Measure layers and plans, and choose the plan that harms least."""
    everything = target.everything
    fixed = everything - set(target.changeable)
    if not any(map(any, *harms("all layers", [fixed]))):
        raise ValueError(
            f"`attention`: as good as full attention on documents of up to {job.length} tokens; "
            "choose longer ones, or less that a token sees"
        )
    alone = harms("one layer", [everything - {i} for i in target.changeable])
    layers = [{"layer": i, **_mean(harm)} for i, harm in zip(target.changeable, alone)]
    layers.sort(key=lambda row: (-row["harm"], row["layer"]))
    by_harm = [row["layer"] for row in layers]
    plans = {"most harmed": fixed | set(by_harm[: target.count - len(fixed)])}
    plans |= target.rules()
    told = [*plans.items(), ("no other layer" if fixed else "no layer", fixed)]
    measured = harms("plans", [full for _, full in told])
    found = {name: _mean(harm) for (name, _), harm in zip(told, measured)}
    chosen = min(plans, key=lambda name: found[name]["harm"])
    return {
        "layers": layers,
        "plans": {
            name: {"full": sorted(full), **found[name], "attention": target.config(full)}
            for name, full in told
        },
        "chosen": chosen,
        "attention": target.config(plans[chosen]),
    }


def _mean(added: Sequence[Cost]) -> dict[str, Any]:
    """Return means over documents, and the standard error of the harm; None: of one document."""
    harms = [cost.missed for cost in added]
    error = statistics.stdev(harms) / len(harms) ** 0.5 if len(harms) > 1 else None
    loss = statistics.fmean(cost.loss for cost in added)
    return {"harm": statistics.fmean(harms), "error": error, "loss": loss}
