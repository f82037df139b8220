"""What stands before the server: keys, size and time of a request, and clients that are gone."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from transformers.cli.serving.utils import X_REQUEST_ID

from bitnet_triton.serving.limits import Limits

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Gate:
    """An ASGI application around another one.

    Every request gets a name of ours: clients could take each other's otherwise, since the engine
    knows requests by name. A client that goes away ends its request, in whatever state it is.

    Args:
        app: the application behind.
        limits: bytes and seconds of a request.
        key: what clients have to bring; None lets all in.
        abandon: frees what the request of that name holds.
    """

    def __init__(
        self, app: Any, limits: Limits, key: str | None, abandon: Callable[[str], None]
    ) -> None:
        self._app, self._limits, self._abandon = app, limits, abandon
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or one connection's life."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._may_enter(headers) and scope["path"] != "/health":
            await _answer(send, 401, "expected the server's key as `Authorization: Bearer KEY`")
            return
        body, status, problem = await self._read(headers, receive)
        if problem:
            await _answer(send, status, problem)
        elif body is not None:
            await self._serve(scope, body, receive, send)

    def _may_enter(self, headers: dict[bytes, bytes]) -> bool:
        if self._key is None:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)

    async def _read(
        self, headers: dict[bytes, bytes], receive: Receive
    ) -> tuple[bytes | None, int, str]:
        """Return the body; or a status and what is wrong; or nothing where the client is gone."""
        most = self._limits.body
        too_long = f"expected a body of at most {most} bytes"
        said = headers.get(b"content-length", b"0")
        if not said.isdigit() or int(said) > most:
            return None, 413, f"{too_long}, got {said.decode('latin-1'):.40}"
        parts, size, more = [], 0, True
        try:
            while more:
                message = await asyncio.wait_for(receive(), self._limits.seconds)
                if message["type"] == "http.disconnect":
                    return None, 0, ""
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    return None, 413, f"{too_long}, got more"
                more = message.get("more_body", False)
        except asyncio.TimeoutError:
            return None, 408, f"the body did not come within {self._limits.seconds:g} s"
        return b"".join(parts), 0, ""

    async def _serve(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Let the application answer for as long as somebody listens."""
        name = f"request-{uuid.uuid4().hex}"
        headers = [pair for pair in scope["headers"] if pair[0] != X_REQUEST_ID.encode()]
        headers.append((X_REQUEST_ID.encode(), name.encode()))
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.ensure_future(_until_gone(receive))

        async def replay() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.shield(gone)
            return {"type": "http.disconnect"}

        answer = asyncio.ensure_future(self._app({**scope, "headers": headers}, replay, send))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._abandon(name)
            for task in (answer, gone):
                if not task.done():
                    task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return an error as OpenAI's API writes it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
