"""The application: transformers' handlers and routes, for one model.

transformers' server loads whatever model a request names, from a folder too, and can be told to
drop what it holds; such routes are left out here, and a request's ``model`` is compared with the
name of the one that is served.
"""

from __future__ import annotations

import copy
import time
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2.exceptions import TemplateError
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    BaseHandler,
    CBWorkerDeadError,
    GenerationState,
    Modality,
)

from bitnet_triton.serving.engine import Engine
from bitnet_triton.serving.gate import Gate, error_body
from bitnet_triton.serving.limits import check_messages, check_prompt, refuse

# For models that have no template: the messages, one a line, without roles
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ '\n' }}{% endfor %}"
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")


class OneModel(ModelManager):
    """What handlers ask for models: there is one, which stays.

    Args:
        name: that requests call it by.
        model: loaded.
        tokenizer: with a chat template.
    """

    # without super().__init__, which loads a model and sets a clock that drops it
    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self._created = int(time.time())

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:  # type: ignore[override]
        """Return that it reads text."""
        return Modality.LLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the list of models."""
        one = {"id": self.name, "object": "model", "owned_by": "", "created": self._created}
        return [one]

    def shutdown(self) -> None:
        """Keep the model: its process ends soon."""


class OneEngine(GenerationState):
    """What handlers ask for engines: there is one.

    Args:
        engine: that runs.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(continuous_batching=True)
        self.engine = engine

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        """Return that it is used."""
        return True

    def get_manager(self, model_id: str, use_cb: bool = False) -> Engine:
        """Return the engine."""
        return self.engine

    def is_cb_alive(self) -> bool:
        """Return whether the engine runs."""
        return self.engine.is_alive()

    def shutdown(self) -> None:
        """Stop the engine."""
        self.engine.stop()


class _Served(BaseHandler):
    """What both handlers do otherwise than transformers'; first of their base classes."""

    model_manager: OneModel
    generation_state: OneEngine

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        one = self.model_manager
        wanted = body.get("model")
        if wanted is not None and wanted != one.name:
            raise refuse(f"`model`: expected {one.name!r}, got {wanted!r:.80}", 404)
        return one.name, one.model, one.tokenizer

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        length, wanted = self.generation_state.engine.limits.settings(body)
        config = copy.deepcopy(model_generation_config)
        config.max_new_tokens = length
        config.wanted = wanted
        return config


class Completions(_Served, CompletionHandler):
    """``/v1/completions``."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        self.generation_state.engine.limits.settings(body)
        check_prompt(body)


class ChatCompletions(_Served, ChatCompletionHandler):
    """``/v1/chat/completions``."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        self.generation_state.engine.limits.settings(body)
        check_messages(body)


def build_app(name: str, model: Any, tokenizer: Any, engine: Engine, key: str | None) -> Gate:
    """Return the ASGI application.

    Args:
        name: that requests call the model by.
        model: loaded, with our attention.
        tokenizer: of the model; gets a plain chat template if it has none.
        engine: that runs the model.
        key: what clients have to bring; None lets all in.
    """
    if tokenizer.chat_template is None:
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
    models, state = OneModel(name, model, tokenizer), OneEngine(engine)
    absent: Any = None
    app = build_server(
        models,
        ChatCompletions(models, state),
        completion_handler=Completions(models, state),
        response_handler=absent,
        transcription_handler=absent,
        systemone_handler=absent,
        generation_state=state,
    )
    kept = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    app.router.routes[:] = kept

    _answer_errors(app)
    return Gate(app, engine.limits, key, engine.abandon)


def _answer_errors(app: Any) -> None:
    """Let every error be answered as OpenAI's clients read it."""

    def answer(status: int, message: str, headers: Any = None) -> JSONResponse:
        return JSONResponse(error_body(status, message), status, headers)

    # Starlette's own class: its routes raise it for unknown addresses and methods
    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(400, f"expected a JSON object as body: {error.errors()[0]['msg']}")

    @app.exception_handler(TemplateError)
    async def untold(_: Request, error: TemplateError) -> JSONResponse:
        return answer(400, f"`messages`: the model's chat template says: {error}")

    @app.exception_handler(CBWorkerDeadError)
    async def dead(_: Request, error: CBWorkerDeadError) -> JSONResponse:
        return answer(503, str(error))
