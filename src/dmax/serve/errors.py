"""What goes wrong over HTTP, in the one form that every client of OpenAI's interface reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.responses import Response

from dmax.errors import InputError, did_you_mean, one_line, printable, shorten, show

SLOW_READER = "slow_reader"


class ApiError(Exception):
    """An error with its HTTP status and its place in the request.

    Attributes:
        status: of the response.
        message: one sentence for whoever sent the request.
        param: path of the field that is wrong, such as `messages[0].role`; None: no single one.
        code: for programs, such as "model_not_found"; None: the status says it all.
        retry_after: seconds after which another try may succeed; None: it would fail again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The standard error body."""
        return {
            "error": {
                "message": printable(self.message),
                "type": error_type(self.status),
                "param": None if self.param is None else shorten(self.param),
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The body as a response, with `Retry-After` where another try makes sense."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        content = json.dumps(self.body()).encode()
        return Response(content, self.status, headers, media_type="application/json")


class ClientGone(Exception):
    """Nobody reads the answer any more: the connection is closed."""


def error_type(status: int) -> str:
    """The `type` of an error body, as OpenAI names them."""
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 429:
            return "rate_limit_error"
        case _:
            return "server_error" if status >= 500 else "invalid_request_error"


def bad_request(error: InputError, param: str | None = None, code: str | None = None) -> ApiError:
    """An `InputError` about a request, with its hint."""
    return ApiError(400, one_line(error), param=param, code=code)


def failure(error: BaseException) -> ApiError:
    """What a client is told of a request that the model or the strategy could not finish.

    An `InputError` has a sentence for it. Of anything else only the type leaves the server.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(500, one_line(error), code="decoding_failed")
    return ApiError(
        500,
        f"the server failed to decode this request ({type(error).__name__}); its log says why",
        code="decoding_failed",
    )


def cause_of(error: ApiError) -> BaseException | None:
    """What went wrong in the server, if an error is not the client's doing."""
    return error.__cause__ if error.status >= 500 else None


def slow_reader() -> ApiError:
    """The end of a stream whose client does not keep up."""
    message = "the stream was read too slowly, so the request was cancelled"
    return ApiError(408, message, code=SLOW_READER)


def invalid_body(
    errors: Sequence[Mapping[str, Any]], body: Any, known: Iterable[str] = ()
) -> ApiError:
    """The first thing that pydantic has against a body, as a sentence that names the field.

    Args:
        errors: as pydantic lists them, with "body" at the start of every place.
        body: what was sent.
        known: names of fields that there are.
    """
    error = max(errors, key=lambda error: _closeness(error, body))
    path = _path(error["loc"], body)
    name = _written(path)
    kind, message = error["type"], error["msg"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error['ctx']['error']}", code="invalid_json")
    if not path:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    if kind == "missing":
        return ApiError(400, f"`{name}` is missing", param=name, code="missing_field")
    if kind == "extra_forbidden":
        hint = did_you_mean(path[-1], known)
        message = f"`{name}` is not a field of this request" + (f"; {hint}" if hint else "")
        return ApiError(400, message, param=name, code="unknown_field")
    if kind == "unsupported":
        why = message[:1].lower() + message[1:].rstrip(".")
        return ApiError(400, f"`{name}` {why}", param=name, code="unsupported_field")
    expected = message.removeprefix("Input ")
    if expected == message:
        expected = f"is wrong: {message[:1].lower()}{message[1:]}"
    message = f"`{name}` {expected}, got {show(error.get('input'))}"
    return ApiError(400, message, param=name, code="invalid_value")


def _closeness(error: Mapping[str, Any], body: Any) -> tuple[int, bool]:
    """How far an alternative of a union got: all complain, and the furthest was meant."""
    return len(_path(error["loc"], body)), not error["type"].endswith("_type")


def _path(loc: Sequence[str | int], body: Any) -> tuple[str | int, ...]:
    """The place of an error in the body, without pydantic's names for alternatives of a union."""
    path: list[str | int] = []
    here = body
    for number, part in enumerate(loc[1:], 2):
        if _holds(here, part):
            here = here[part]
        elif not (isinstance(here, Mapping) and number == len(loc) and isinstance(part, str)):
            continue  # the last part may name what is missing
        path.append(part)
    return tuple(path)


def _holds(value: Any, part: str | int) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _written(path: Sequence[str | int]) -> str:
    """A path as programmers write it, `messages[0].role`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{shorten(part)}" for part in path]
    return "".join(parts).removeprefix(".")
