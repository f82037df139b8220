"""LongRoPE: factors of a model's frequencies are searched for on its user's texts.

Two stages (arXiv:2402.13753): factors of long texts at the wanted length, then, if asked for, those
of short ones. Each candidate costs one reading of some texts by a model that stays in memory; what
it cost is on disk before the next is asked, so a run that was killed goes on to the same result.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from bitnet_triton.models import BitNetForCausalLM
from bitnet_triton.models.extend import extend_context, stretch_of
from bitnet_triton.training.answers import make_prompts
from bitnet_triton.training.monotone import Factors, Generation, evolve
from bitnet_triton.training.options import check_number, write_whole
from bitnet_triton.training.results import Store
from bitnet_triton.training.subject import digest, folder_of
from bitnet_triton.training.tasks import TASKS, TextTokens

Progress = Callable[[str, int, int, float], None]
# ids of a text, and which of them are to be predicted
Probe = tuple[list[int], list[int]]

FITNESS = ("text", "needles")
_SEEDS = {"PI": "linear", "NTK": "ntk", "YaRN": "yarn"}
_HEADROOM = 1.25  # of the largest factor, over the one that is asked for
_SHORT = 2  # up to which factor short texts are searched


@dataclass(frozen=True)
class LongRopeJob:
    """What is asked of ``search_longrope``.

    Attributes:
        output: folder of the run; the same job there goes on with it.
        model: a folder or a name on the Hub.
        texts: files to search on, UTF-8; keep those apart that the result is judged by.
        factor: how many times the trained length.
        length: tokens of a text while factors for long texts are searched; 0: all that the model
            will read, ``factor`` times the trained length.
        samples: texts that a candidate is judged by.
        fitness: "text": all their tokens; "needles": the answers alone to what a text hid far back
            (arXiv:2502.20082).
        population: candidates of a generation.
        generations: after the first one.
        recover: search factors for texts within the trained length as well; otherwise they are 1.
        attention_factor: multiplies cosines and sines, for short texts too; None: by transformers'
            formula, sqrt(1 + ln factor / ln trained length).
        seed: of all draws.
    """

    output: str
    model: str = "recall"
    texts: Sequence[str] = ()
    factor: float = 8
    length: int = 0
    samples: int = 5
    fitness: str = "text"
    population: int = 64
    generations: int = 40
    recover: bool = False
    attention_factor: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("factor", self.factor, above=1)
        for name, least in (
            ("length", 0), ("samples", 1), ("population", 4), ("generations", 0), ("seed", 0),
        ):  # fmt: skip
            check_number(name, getattr(self, name), least=least, whole=True)
        if self.attention_factor is not None:
            check_number("attention_factor", self.attention_factor, above=0)
        if self.fitness not in FITNESS:
            names = " or ".join(FITNESS)
            raise ValueError(f"`fitness`: expected {names}, got {self.fitness!r}")
        if not isinstance(self.recover, bool):
            raise TypeError(f"`recover`: expected true or false, got {self.recover!r}")
        if self.fitness == "text" and not self.texts:
            raise ValueError("`texts`: expected at least one file to search on, got none")


def search_longrope(job: LongRopeJob, progress: Progress | None = None) -> dict[str, Any]:
    """Search factors, and write the model with them to ``output/model``.

    Its weights are those of the source, byte by byte; its config has transformers' own type
    ``longrope``. ``output/report.json`` tells each generation, ``output/generations.png`` shows
    them where matplotlib is installed.

    Args:
        job: what is asked.
        progress: told the stage, candidates read, candidates in all, and the smallest loss.

    Returns:
        ``run``; for each stage ``seeds`` (loss by name), ``generations`` (smallest and median
        loss), ``loss`` and ``factors``; and ``rope_parameters``.

    Raises:
        ValueError: there is no such model or text, the texts are too short for the length, the
            length is not beyond the trained one, or ``output`` holds another run.
    """
    with folder_of(job.model) as folder:
        model: Any = BitNetForCausalLM.from_pretrained(folder, fuse=True).eval()
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        known = dict(model.config.rope_parameters)
        starts = _seeds(model, job.factor, known, "long_factor")
        ones = (1.0,) * len(starts["PI"])
        extra: dict[str, Any] = (
            {} if job.attention_factor is None else {"attention_factor": job.attention_factor}
        )
        short = known.get("short_factor", ones)
        extend_context(
            model, job.factor, "longrope", long_factor=starts["YaRN"], short_factor=short, **extra
        )
        trained = model.config.rope_parameters["original_max_position_embeddings"]
        length = job.length or math.floor(trained * job.factor)
        if length <= trained:
            raise ValueError(
                f"`length`: expected more than the trained {trained} tokens, got {length}"
            )
        stages = {"long": (length, starts, job.factor * _HEADROOM)}
        if job.recover:
            shorts = {"none": ones, **_seeds(model, _SHORT, known, "short_factor")}
            stages["short"] = (trained, shorts, _SHORT * _HEADROOM)
        tokens = TextTokens(AutoTokenizer.from_pretrained(folder), held_out=False)
        probes = {name: _probes(job, tokens, stage[0]) for name, stage in stages.items()}
        run = {**asdict(job), "texts": list(job.texts), "length": length, "trained": trained}
        del run["output"]
        store = Store(Path(job.output), {**run, "digest": digest(folder), "on": _digest(probes)})
        report: dict[str, Any] = {"run": run}
        for name, (_, start, most) in stages.items():
            report[name] = _search(job, model, (name, start, most), probes[name], store, progress)
        parameters = dict(model.config.rope_parameters)
        parameters |= {f"{name}_factor": report[name]["factors"] for name in stages}
        report["rope_parameters"] = parameters
        _write_model(Path(folder), Path(job.output), parameters, job.factor)
    write_whole(Path(job.output) / "report.json", json.dumps(report, indent=1) + "\n")
    _draw(report, list(stages), Path(job.output) / "generations.png")
    return report


def _seeds(model: Any, factor: float, known: dict[str, Any], own: str) -> dict[str, Factors]:
    """Return what the search begins with: three methods, and factors that the model has."""
    found = {name: tuple(stretch_of(model, factor, method)) for name, method in _SEEDS.items()}
    if own in known and tuple(known[own]) not in found.values():
        found["the model's own"] = tuple(float(value) for value in known[own])
    return found


def _probes(job: LongRopeJob, tokens: TextTokens, length: int) -> list[Probe]:
    """Return what candidates are judged by; equal jobs get equal ones."""
    if job.fitness == "needles":
        prompts = make_prompts(
            "needles", TASKS["needles"], tokens, length, job.samples, (0.1, 0.3, 0.5), job.seed
        )
        found = []
        for prompt in prompts:
            ids: list[int] = list(prompt.context)
            wanted: list[int] = []
            for turn in prompt.turns:
                ids += turn.question
                wanted += range(len(ids), len(ids) + len(turn.answer))
                ids += turn.answer
            found.append((ids, wanted))
        return found
    room = length - len(tokens.start)
    pieces: list[list[int]] = []
    for path in job.texts:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"`texts`: expected a file in UTF-8, got {path}: {error}") from error
        ids = tokens.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [ids[at : at + room] for at in range(0, len(ids) - room + 1, room)]
    if len(pieces) < job.samples:
        raise ValueError(
            f"`texts`: expected {job.samples} stretches of {room} tokens, got {len(pieces)}; give "
            "longer files, fewer `samples` or a smaller `length`"
        )
    # as far from each other as they can be
    places = [len(pieces) * index // job.samples for index in range(job.samples)]
    return [(tokens.start + pieces[place], list(range(1, length))) for place in places]


def _digest(probes: dict[str, list[Probe]]) -> str:
    return hashlib.sha256(json.dumps(probes).encode()).hexdigest()[:16]


def _search(
    job: LongRopeJob,
    model: Any,
    stage: tuple[str, dict[str, Factors], float],
    probes: list[Probe],
    store: Store,
    progress: Progress | None,
) -> dict[str, Any]:
    name, start, most = stage
    known = {tuple(line["factors"]): line["loss"] for line in store.lines if line["stage"] == name}
    asked: dict[Factors, float] = {}
    new = max(2, job.population - max(2, job.population // 2))
    total = max(job.population, len(set(start.values()))) + job.generations * new

    def loss(factors: Factors) -> float:
        if factors not in known:
            known[factors] = loss_of(model, f"{name}_factor", factors, probes)
            store.add({"stage": name, "factors": list(factors), "loss": known[factors]})
        asked[factors] = known[factors]
        if progress is not None:
            progress(name, len(asked), total, min(asked.values()))
        return known[factors]

    found: list[Generation] = list(
        evolve(
            start, loss, most=most, population=job.population, rounds=job.generations, seed=job.seed
        )
    )
    model.config.rope_parameters[f"{name}_factor"] = list(found[-1].best)
    return {
        "seeds": {who: asked[factors] for who, factors in start.items()},
        "generations": [
            {"best": one.ranked[0][0], "median": one.ranked[len(one.ranked) // 2][0]}
            for one in found
        ],
        "loss": found[-1].ranked[0][0],
        "factors": list(found[-1].best),
    }  # fmt: skip


@torch.inference_mode()
def loss_of(model: Any, name: str, factors: Factors, probes: Sequence[Probe]) -> float:
    """Return what a candidate costs, nats a token; the model has its factors from then on.

    Args:
        model: of rope type ``longrope``.
        name: ``long_factor`` or ``short_factor``.
        factors: of the candidate.
        probes: texts, and the places in them of the tokens that count.
    """
    # frequencies are computed from there, call by call
    model.config.rope_parameters[name] = list(factors)
    model.base_model.rotary_emb.rope_parameters = dict(model.config.rope_parameters)
    total, count = 0.0, 0
    for ids, wanted in probes:
        text = torch.tensor([ids], device=model.device)
        places = torch.tensor(wanted, device=model.device)
        logits = model(text, use_cache=False, logits_to_keep=places - 1).logits[0]
        nats = F.cross_entropy(logits.float(), text[0, places], reduction="none")
        total, count = total + nats.double().sum().item(), count + len(wanted)
    return total / count


def _write_model(source: Path, output: Path, parameters: dict[str, Any], factor: float) -> None:
    """Copy a checkpoint, and change what its config says of positions."""
    partial, target = output / "model.partial", output / "model"
    for left in (partial, target):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(".*", "README.md"))
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    for former in ("rope_theta", "rope_scaling"):  # of older writers
        config.pop(former, None)
    config["rope_parameters"] = parameters
    trained = parameters["original_max_position_embeddings"]
    config["max_position_embeddings"] = math.ceil(trained * factor)
    write_whole(partial / "config.json", json.dumps(config, indent=2) + "\n")
    partial.replace(target)


def _draw(report: dict[str, Any], stages: list[str], path: Path) -> None:
    """Draw the losses of each generation; nothing where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5 * len(stages), 3.5))
    for axis, name in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        found = report[name]
        for what, style in (("best", "-"), ("median", ":")):
            axis.plot([g[what] for g in found["generations"]], style, color="tab:blue", label=what)
        for number, (who, loss) in enumerate(found["seeds"].items(), 1):
            axis.axhline(loss, color=f"C{number}", lw=0.8, ls="--", label=who)
        axis.set_title(f"factors of {name} texts", fontsize=10)
        axis.set_xlabel("generation")
        axis.set_ylabel("nats a token")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")
