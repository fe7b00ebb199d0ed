"""The routes of OpenAI's interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from dmax import __version__
from dmax.errors import InputError, did_you_mean, show
from dmax.serve import page
from dmax.serve.answers import Answer
from dmax.serve.bodies import ChatRequest, CompletionRequest, field_names
from dmax.serve.errors import ApiError, ClientGone, cause_of, failure, invalid_body
from dmax.serve.log import CLIENT_GONE, Record
from dmax.serve.openapi import add_openapi
from dmax.serve.params import read
from dmax.serve.replies import (
    ANSWER_ERRORS,
    ERRORS,
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Health,
    ModelCard,
    ModelList,
    answers,
)
from dmax.serve.served import ServedModel
from dmax.serve.settings import ServerOptions
from dmax.serve.stream import StreamResponse, watched

ROUTING = {
    400: "the body is not JSON that can be read",
    404: "there is nothing at this address",
    405: "this address takes other methods",
}
"""What FastAPI and Starlette mean by errors of their own."""


def create_app(models: Sequence[ServedModel], options: ServerOptions) -> FastAPI:
    """The interface over models that may still be loading.

    What guards it from strangers stands around it (`dmax.serve.guard`).

    Args:
        models: with different names.
        options: limits.

    Raises:
        InputError: two models have the same name, or there are none.
    """
    by_name = {model.name: model for model in models}
    if not models or len(by_name) < len(models):
        raise InputError("a server takes at least one model, and no two of the same name")
    app = FastAPI(title="dmax", version=__version__, docs_url=None, redoc_url=None)
    app.state.models = by_name
    _add_errors(app)
    _add_routes(app, by_name)
    app.include_router(page.router())
    add_openapi(app, models, options)
    return app


def _add_routes(app: FastAPI, models: dict[str, ServedModel]) -> None:
    @app.get("/health", responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> Response:
        """Whether all models are loaded and warm."""
        loading = [model.name for model in models.values() if not model.is_ready]
        status = "loading" if loading else "ok"
        return _json({"status": status, "loading": loading}, 503 if loading else 200)

    @app.get("/v1/models", responses={200: {"model": ModelList}, **ERRORS})
    async def list_models() -> Response:
        """The models that are served."""
        data = [await run_in_threadpool(model.describe) for model in models.values()]
        return _json({"object": "list", "data": data})

    @app.get(
        "/v1/models/{name:path}",
        responses={200: {"model": ModelCard}, 404: ANSWER_ERRORS[404], **ERRORS},
    )
    async def get_model(name: str) -> Response:
        """One of the models that are served."""
        return _json(await run_in_threadpool(_find(models, name).describe))

    @app.post("/v1/chat/completions", responses=answers(ChatCompletion, ChatChunk))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await _answer(body, _find(models, body.model), request)

    @app.post("/v1/completions", responses=answers(Completion, CompletionChunk))
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids as they are, without a chat template."""
        return await _answer(body, _find(models, body.model), request)


async def _answer(
    body: ChatRequest | CompletionRequest, model: ServedModel, request: Request
) -> Response:
    asked = await run_in_threadpool(read, body, model)
    ongoing = model.start(asked.requests, is_read_slowly=asked.is_stream)
    answer = Answer(asked, model, _record(request))
    if asked.is_stream:
        return StreamResponse(ongoing, answer)
    try:
        with ongoing, watched(request.receive, ongoing):
            async for events in ongoing.steps():
                for event in events:
                    answer.take(event)
    except ClientGone:
        answer.leave()
        return Response(status_code=CLIENT_GONE)
    return _json(answer.whole())


def _find(models: dict[str, ServedModel], name: str) -> ServedModel:
    if name not in models:
        hint = did_you_mean(name, models) or f"it serves {', '.join(models)}"
        message = f"this server has no model {show(name)}; {hint}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return models[name]


def _record(request: Request) -> Record:
    """What the log will say of a request; of one that nothing logs, a record of its own."""
    record = getattr(request.state, "record", None)
    return record if isinstance(record, Record) else Record()


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content).encode(), status, media_type="application/json")


def _add_errors(app: FastAPI) -> None:
    def respond(request: Request, error: ApiError) -> Response:
        _record(request).fail(error.code, cause_of(error))
        return error.response()

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        known = field_names(request.url.path)
        return respond(request, invalid_body(error.errors(), error.body, known))

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        message = ROUTING.get(error.status_code, str(error.detail))
        response = respond(request, ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return respond(request, failure(error))
