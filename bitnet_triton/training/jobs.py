"""What is asked of ``adapt`` and ``pretrain``: every attribute is an option of its command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitnet_triton.training.answers import QUESTIONS
from bitnet_triton.training.fit import Schedule
from bitnet_triton.training.options import check_number
from bitnet_triton.training.tasks import check_tasks


@dataclass(frozen=True)
class DocumentJob:
    """What every run over documents is asked.

    Attributes:
        output: folder of the run.
        model: a folder or a name on the Hub; ``recall`` and ``tiny`` are embedded.
        data: a text file, or JSON lines with ``text`` or ``prompt`` and ``answer``.
        tokens: of all documents; files are cut to so many.
        length: tokens of a document at most.
        seed: of the documents, and of a training.
    """

    output: str
    model: str = "recall"
    data: str = "tasks"
    tokens: int = 20_000
    length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("output", "model", "data"):
            check_word(name, getattr(self, name))
        check_number("seed", self.seed, least=0, whole=True)
        check_number("tokens", self.tokens, least=1, whole=True)
        check_number("length", self.length, least=64, whole=True)
        self._check_room("tokens")

    def _check_room(self, name: str) -> None:
        value = getattr(self, name)
        if value < self.length:
            raise ValueError(
                f"`{name}`: expected at least a document of {self.length}, got {value}"
            )


@dataclass(frozen=True)
class AttentionJob(DocumentJob):
    """What is asked of runs that may read tasks, with some attention.

    Its ``data`` may be ``tasks``, which are drawn to as many ``tokens``.

    Attributes:
        attention: how the model attends, as ``parse_setting`` reads it.
        text: of the tasks' tokens, the share that is text alone.
        question: the phase that the questions of tasks belong to, "prompt" or "decode", or "both",
            in turns.
    """

    attention: str | Mapping[str, Any] = "full"
    text: float = 0.1
    question: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.attention, Mapping) and self.attention):
            check_word("attention", self.attention)
        check_number("text", self.text, least=0, most=1)
        if self.question not in (*QUESTIONS, "both"):
            names = ", ".join(QUESTIONS)
            raise ValueError(f"`question`: expected {names} or both, got {self.question!r}")

    @property
    def questions(self) -> tuple[str, ...]:
        """The phases that questions belong to."""
        return QUESTIONS if self.question == "both" else (self.question,)


@dataclass(frozen=True)
class Job(DocumentJob):
    """What every training is asked.

    Attributes:
        row: tokens of a row of packed documents; 0: ``length``.
        rate: peak learning rate.
        warm_up: share of the steps in which it rises.
        accumulate: rows of a step.
        epochs: times that every document is seen.
        save_every: steps between checkpoints.
    """

    row: int = 0
    rate: float = 1e-4
    warm_up: float = 0.05
    accumulate: int = 1
    epochs: int = 1
    save_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("row", self.row, least=0, whole=True)
        for name in ("accumulate", "epochs", "save_every"):
            check_number(name, getattr(self, name), least=1, whole=True)
        check_number("rate", self.rate, above=0)
        check_number("warm_up", self.warm_up, least=0, most=1)
        if self.row:
            self._check_room("row")

    @property
    def schedule(self) -> Schedule:
        """How it is trained."""
        return Schedule(
            row=self.row or self.length, accumulate=self.accumulate, epochs=self.epochs,
            rate=self.rate, warm_up=self.warm_up, seed=self.seed, save_every=self.save_every,
        )  # fmt: skip


@dataclass(frozen=True)
class TrainingJob(AttentionJob, Job):
    """What every training of a ternary model is asked, beside what each one is.

    Attributes:
        eval_tasks: measured before and after. Default: those that are not hard, for ``tasks``.
        eval_length: tokens of their prompts, and of the text.
        eval_samples: prompts of each.
        eval_seed: of these prompts.
    """

    eval_tasks: Sequence[str] | None = None
    eval_length: int = 2048
    eval_samples: int = 20
    eval_seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eval_seed", self.eval_seed, least=0, whole=True)
        for name in ("eval_length", "eval_samples"):
            check_number(name, getattr(self, name), least=1, whole=True)
        if self.eval_tasks is not None:
            check_words("eval_tasks", self.eval_tasks)
            try:
                check_tasks(self.eval_tasks)
            except ValueError as error:
                raise ValueError(str(error).replace("`tasks`", "`eval_tasks`")) from error


@dataclass(frozen=True)
class Adaptation(TrainingJob):
    """What is asked of ``adapt``.

    Attributes:
        self_distill: answers are those that the model gives with full attention, kept if right.
        answer_tokens: most tokens of such an answer to a prompt of a file.
        lora: train adapters; otherwise all weights, from masters.
        rank: of the adapters.
        alpha: the adapters' product counts alpha / rank.
        targets: the linears that get adapters.
        merge: put the adapters into the packed weights, and measure what that loses.
        transfer: times that documents are seen before the training, layer by layer, by what a mode
            brings along: it learns to give what the attention of ``model`` gave in its place.
        transfer_rate: peak learning rate of that.
    """

    attention: str | Mapping[str, Any] = "swaa-trained"
    self_distill: bool = False
    answer_tokens: int = 64
    lora: bool = True
    rank: int = 16
    alpha: float = 128
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj")
    merge: bool = False
    transfer: int = 0
    transfer_rate: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("self_distill", "lora", "merge"):
            check_switch(name, getattr(self, name))
        for name in ("answer_tokens", "rank"):
            check_number(name, getattr(self, name), least=1, whole=True)
        for name in ("alpha", "transfer_rate"):
            check_number(name, getattr(self, name), above=0)
        check_number("transfer", self.transfer, least=0, whole=True)
        check_words("targets", self.targets)
        if not self.targets:
            raise ValueError("`targets`: expected at least one linear, got none")
        if self.merge and not self.lora:
            raise ValueError("`merge`: expected adapters (`lora`), got a training of all weights")

    @property
    def schedule(self) -> Schedule:
        """How it is trained: masters in float32, under autocast."""
        return replace(super().schedule, bfloat16=not self.lora)


@dataclass(frozen=True)
class Calibration(AttentionJob):
    """What is asked of ``calibrate``.

    Attributes:
        attention: what layers are changed to. Full layers of a preset are chosen anew.
        full_layers: how many layers stay full: a number, or a share below 1.
        self_distill: answers are those that the model gives with full attention, kept if right.
        answer_tokens: most tokens of such an answer to a prompt of a file.
    """

    attention: str | Mapping[str, Any] = "swaa-trained"
    text: float = 0.0
    full_layers: float = 0.5
    self_distill: bool = False
    answer_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switch("self_distill", self.self_distill)
        check_number("answer_tokens", self.answer_tokens, least=1, whole=True)
        check_number("full_layers", self.full_layers, least=0)
        if self.full_layers >= 1 and self.full_layers != int(self.full_layers):
            raise ValueError(
                "`full_layers`: expected a share below 1 or a number of layers, got "
                f"{self.full_layers}"
            )

    def count(self, layers: int) -> int:
        """Return how many of so many layers stay full.

        Raises:
            ValueError: there are not that many.
        """
        if self.full_layers < 1:
            return round(self.full_layers * layers)
        if self.full_layers > layers:
            raise ValueError(f"`full_layers`: expected up to {layers}, got {self.full_layers}")
        return int(self.full_layers)


@dataclass(frozen=True)
class Pretraining(TrainingJob):
    """What is asked of ``pretrain``: all weights, by the b1.58 recipe (``TwoStages``).

    Attributes:
        scratch: begin with random weights; of ``model``, its sizes and its tokenizer are taken.
    """

    scratch: bool = False
    rate: float = 1.5e-3
    tokens: int = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switch("scratch", self.scratch)

    @property
    def schedule(self) -> Schedule:
        """How it is trained."""
        return replace(super().schedule, bfloat16=True, recipe=True)


def check_word(name: str, value: Any) -> None:
    """Raise TypeError unless an option is a word."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"`{name}`: expected a word, got {value!r}")


def check_switch(name: str, value: Any) -> None:
    """Raise TypeError unless an option is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}`: expected true or false, got {value!r}")


def check_words(name: str, value: Any) -> None:
    """Raise TypeError unless an option is a list of words."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(word, str) for word in value):
        raise TypeError(f"`{name}`: expected a list of names, got {value!r}")
