"""What the server takes, in numbers, and what it says to a request for more or for other things."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

# name: smallest and largest number; the same for both kinds of completions
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}  # fmt: skip
_INTEGERS: dict[str, tuple[int, int]] = {"top_k": (1, 2**31 - 1), "seed": (0, 2**63 - 1)}
_SHAPES = ("temperature", "top_k", "top_p", "min_p")  # one that is given means sampling
_LENGTHS = ("max_tokens", "max_completion_tokens")
_SERVED = {"model", "prompt", "messages", "stream", "stream_options", "user", *_LENGTHS}
# Fields of the API that are not served, by the values that ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "presence_penalty": (0,),
    "frequency_penalty": (0,), "logprobs": (False,), "logit_bias": ({},), "suffix": ("",),
    "tools": ([],), "stop": ([],),
}  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant")


def refuse(message: str, status: int = 400) -> HTTPException:
    """Return the error that answers a request with ``status`` and one line."""
    return HTTPException(status_code=status, detail=message)


@dataclass(frozen=True)
class Limits:
    """How much one request, and all of them together, may take.

    Args:
        context: tokens of one text, prompt and answer.
        pages: tokens that all texts may hold together.
        new_tokens: tokens of one answer.
        body: bytes of one request.
        seconds: from a request's arrival to its end.
        requests: that are served or wait at a time.
    """

    context: int
    pages: int
    new_tokens: int
    body: int
    seconds: float
    requests: int

    @property
    def longest(self) -> int:
        """Tokens of the longest text: what the model reads, and what memory holds."""
        return min(self.context, self.pages)

    def length(self, prompt: int, wanted: int | None) -> int:
        """Return how many tokens to write behind ``prompt`` tokens.

        Args:
            prompt: tokens of the prompt.
            wanted: tokens that the request asks for; None leaves it to the server.

        Raises:
            HTTPException: 400, there is not so much room.
        """
        if not prompt:
            raise refuse("the prompt has no tokens")
        what = f"a prompt of {prompt} tokens and an answer of {wanted or 1}"
        if prompt + (wanted or 1) > self.context:
            raise refuse(f"{what} are more than the model's context of {self.context} tokens")
        if prompt + (wanted or 1) > self.pages:
            raise refuse(f"{what} are more than memory holds, {self.pages} tokens")
        return min(self.new_tokens, self.longest - prompt) if wanted is None else wanted

    def settings(self, body: dict[str, Any]) -> tuple[int | None, dict[str, Any]]:
        """Return the length that a request asks for, and how it wants its tokens chosen.

        Args:
            body: of a request.

        Raises:
            HTTPException: 400, a field is unknown, not served, or out of range.
        """
        known = {*_SERVED, *_NUMBERS, *_INTEGERS, *_NEUTRAL}
        for name, value in body.items():
            if name not in known:
                raise refuse(f"`{name}`: not served")
            if name in _NEUTRAL and value is not None and not _asks_nothing(name, value):
                raise refuse(f"`{name}`: not served, got {value!r:.60}")
        if not isinstance(body.get("stream", False), bool):
            raise refuse(f"`stream`: expected true or false, got {body['stream']!r:.60}")
        return self._length_wanted(body), _chosen(body)

    def _length_wanted(self, body: dict[str, Any]) -> int | None:
        given = [name for name in _LENGTHS if body.get(name) is not None]
        wanted = {_number(name, body[name], 1, self.new_tokens, True) for name in given}
        if len(wanted) > 1:
            raise refuse(f"`{_LENGTHS[0]}` and `{_LENGTHS[1]}`: expected one number, got two")
        return wanted.pop() if wanted else None


def _asks_nothing(name: str, value: Any) -> bool:
    """Tell whether a field has a neutral value: `false` may be one where 0 asks for something."""
    return any(
        isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
        for neutral in _NEUTRAL[name]
    )


def _chosen(body: dict[str, Any]) -> dict[str, Any]:
    """Return how a request wants its tokens chosen, as a generation config calls it."""
    chosen: dict[str, Any] = {}
    for name, (low, high) in (_NUMBERS | _INTEGERS).items():
        value = body.get(name)
        if value is not None:
            chosen[name] = _number(name, value, low, high, name in _INTEGERS)
    if any(name in chosen for name in _SHAPES):
        chosen["do_sample"] = chosen.get("temperature") != 0.0
    if chosen.get("temperature") == 0.0:
        del chosen["temperature"]
    if chosen.get("top_p") == 0.0:
        raise refuse("`top_p`: expected a number above 0, got 0")
    return chosen


def _number(name: str, value: Any, low: float, high: float, whole: bool) -> Any:
    """Return a number of a request; refuse what is none, infinite or out of range."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        noun = "an integer" if whole else "a number"
        raise refuse(f"`{name}`: expected {noun} from {low} to {high}, got {value!r:.60}")
    if not whole and not math.isfinite(value):  # pragma: no cover - the range has no NaN
        raise refuse(f"`{name}`: expected a finite number")
    return value if whole else float(value)


def check_prompt(body: dict[str, Any]) -> None:
    """Refuse a prompt that is not one text.

    Raises:
        HTTPException: 400.
    """
    if not isinstance(body.get("prompt"), str):
        raise refuse("`prompt`: expected one text; lists and token ids are not served")
    _check_text("prompt", body["prompt"])


def check_messages(body: dict[str, Any]) -> None:
    """Refuse messages that are not text: nothing is loaded from an address or a file.

    Raises:
        HTTPException: 400.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise refuse("`messages`: expected a list with one message or more")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise refuse(f"`messages`: expected the roles {', '.join(_ROLES)}")
        unknown = sorted(message.keys() - {"role", "content", "name"})
        if unknown:
            raise refuse(f"`messages`: `{unknown[0]}` is not served")
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise refuse(f"`messages`: expected text, got {kind!r:.60}")
            _check_text("messages", part.get("text"))


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise refuse(f"`{name}`: expected text, got {type(text).__name__}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise refuse(f"`{name}`: expected Unicode, got half of a surrogate pair")
