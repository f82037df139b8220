"""Documents in one row: none sees another, positions start again, and answers alone have a loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorWithFlattening

IGNORED = -100
_MASKS = ("completion_mask", "assistant_masks")
_TELLING = ("labels", *_MASKS, "prompt_len")


class PackingCollator(DataCollatorWithFlattening):
    """Make one row of all documents of a batch, for any trainer of the ecosystem.

    It emits what ``DataCollatorWithFlattening`` of transformers does with all its options
    (``position_ids`` that start again, ``cu_seq_lens_q`` and ``_k``, ``max_length_q`` and ``_k``),
    and reads besides what says which tokens are answers:

    - ``labels``, as ever: -100 for tokens without a loss;
    - ``completion_mask`` and ``assistant_masks`` of trl: ones for answers;
    - ``prompt_len``: so many tokens are a prompt. Without labels, all that follow are the answer.

    A feature may be a list of documents, as ``pack_rows`` makes them, or one with ``seq_lengths``,
    as trl packs them. ``Trainer`` removes columns that the forward of a model does not name, before
    they come here: ``completion_mask`` always, ``prompt_len`` beside models of transformers' own
    classes. Set ``remove_unused_columns=False`` for these; ``answers_only`` tells. Attention modes
    that cannot keep documents apart refuse the batch. A document without tokens is left out.

    Args:
        tell_prompts: hand ``prompt_len`` on, an integer for each document, for models whose
            attention treats generated tokens otherwise. Default: these go by the first label.
        answers_only: refuse documents that do not say which tokens are answers. Default: all tokens
            of such a document have a loss.
        **kwargs: as for ``DataCollatorWithFlattening``.
    """

    def __init__(
        self, *, tell_prompts: bool = False, answers_only: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**{"return_flash_attn_kwargs": True, **kwargs})
        self.tell_prompts, self.answers_only = tell_prompts, answers_only

    def __call__(
        self,
        features: Sequence[Any],
        return_tensors: str | None = None,
        separator_id: int | None = None,
    ) -> dict[str, Any]:
        """Map documents to a batch [1, tokens].

        Raises:
            KeyError: ``tell_prompts``, and a document has none.
            ValueError: labels or a mask are not as long as their document, a prompt is longer, a
                document has padding, or, with ``answers_only``, does not tell its answers; a
                feature has ``seq_lengths`` and ``prompt_len``; no document has tokens.
        """
        documents = [document for feature in features for document in _documents(feature)]
        for document in documents:
            self._check(document)
        parts = [{"input_ids": _ids(d), "labels": answer_labels(d)} for d in documents]
        documents = [d for d, part in zip(documents, parts) if part["input_ids"]]
        parts = [part for part in parts if part["input_ids"]]
        if not parts:
            raise ValueError("`features`: expected a document with tokens, got none")
        batch = super().__call__(parts, return_tensors, separator_id)
        if self.tell_prompts:
            lengths = [int(document["prompt_len"]) for document in documents]
            batch["prompt_len"] = torch.tensor(lengths, dtype=torch.int32)
        return batch

    def _check(self, document: Mapping[str, Any]) -> None:
        mask = document.get("attention_mask")
        if mask is not None and not all(_plain(mask)):
            raise ValueError("`attention_mask`: expected documents without padding, got zeros")
        if self.answers_only and not any(document.get(name) is not None for name in _TELLING):
            raise ValueError(
                f"`answers_only`: expected one of {', '.join(_TELLING)} in each document, got "
                f"{', '.join(document)}; Trainer keeps them with `remove_unused_columns=False`"
            )


def answer_labels(document: Mapping[str, Any]) -> list[int]:
    """Return the labels of a document: its tokens where they count, -100 elsewhere.

    Args:
        document: ``input_ids``, and ``labels``, a mask, ``prompt_len`` or nothing.

    Raises:
        ValueError: they do not fit the tokens.
    """
    ids = _ids(document)
    prompt = document.get("prompt_len", 0)
    if not 0 <= prompt <= len(ids):
        raise ValueError(f"`prompt_len`: expected at most {len(ids)} tokens, got {prompt}")
    for name in ("labels", *_MASKS):
        given = document.get(name)
        if given is None:
            continue
        given = _plain(given)
        if len(given) != len(ids):
            raise ValueError(f"`{name}`: expected {len(ids)}, one a token, got {len(given)}")
        if name == "labels":
            return given
        return [token if counts else IGNORED for token, counts in zip(ids, given)]
    return [IGNORED] * prompt + ids[prompt:]


def pack_rows(
    documents: Iterable[Mapping[str, Any]], length: int
) -> Iterator[list[Mapping[str, Any]]]:
    """Yield rows of whole documents, in their order, with at most ``length`` tokens.

    Raises:
        ValueError: a document is longer; cutting it is up to the caller, who knows where.
    """
    row: list[Mapping[str, Any]] = []
    used = 0
    for document in documents:
        size = len(document["input_ids"])
        if size > length:
            raise ValueError(f"`length`: expected at least {size}, a whole document, got {length}")
        if used + size > length:
            yield row
            row, used = [], 0
        row.append(document)
        used += size
    if row:
        yield row


def _documents(feature: Any) -> Iterator[Mapping[str, Any]]:
    for row in feature if isinstance(feature, Sequence) else [feature]:
        lengths = row.get("seq_lengths")
        if lengths is None:
            yield row
            continue
        if row.get("prompt_len") is not None:
            raise ValueError("`prompt_len`: expected labels or a mask beside `seq_lengths`")
        columns = {name: _plain(row[name]) for name in ("input_ids", *_TELLING[:-1]) if name in row}
        if sum(_plain(lengths)) != len(columns["input_ids"]):
            total = len(columns["input_ids"])
            raise ValueError(f"`seq_lengths`: expected lengths that sum to {total}, got {lengths}")
        start = 0
        for length in _plain(lengths):
            yield {name: column[start : start + length] for name, column in columns.items()}
            start += length


def _ids(document: Mapping[str, Any]) -> list[int]:
    return _plain(document["input_ids"])


def _plain(values: Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
