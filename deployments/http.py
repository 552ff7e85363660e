"""HTTP: routes, bodies, errors and their OpenAPI description, all made of one table of endpoints."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from deployments.answers import ErrorBody, ErrorDetail
from deployments.bodies import decode_body
from deployments.config import ApiConfig
from deployments.protocol import NOTHING
from deployments.request_log import RequestLog, RequestRecord
from rayllm import __version__
from rayllm.errors import ContextLengthError, EngineDeadError, QueueFullError, UsageError
from rayllm.frontend.aside import aside
from rayllm.sampling_params import SamplingParams

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = {429: "1", 503: "5"}
REQUEST_ID = "x-request-id"
ERROR_STATUSES = {
    400: "A field is wrong; `error.param` names it",
    401: "No valid API key",
    404: "No such model or path",
    405: "No such method",
    413: "The body is too large",
    415: "The body is compressed",
    429: "Too much is waiting already: try again after `Retry-After` seconds",
    500: "A fault of the server",
    503: "There is no engine at present: try again after `Retry-After` seconds",
}

_encode = msgspec.json.encode


class ApiError(Exception):
    """An answer with an error body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message, _error_type(status), param, code)


def _error_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_of(error: Exception) -> ApiError:
    """What the client is told of an exception."""
    match error:
        case ApiError():
            return error
        case msgspec.ValidationError():
            return ApiError(400, *_explain(str(error)))
        case msgspec.DecodeError():
            return ApiError(400, f"the body is not valid JSON: {error}")
        case UnicodeDecodeError():
            return ApiError(400, "the body is not valid UTF-8")
        case UsageError():
            code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
            return ApiError(400, str(error), error.param, code)
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full")
        case EngineDeadError():
            return ApiError(503, str(error), code="engine_unavailable")
        case HTTPException():
            return ApiError(error.status_code, error.detail.lower())
    logger.error("an unexpected error", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def _explain(message: str) -> tuple[str, str | None]:
    """msgspec's message in our words, and the field that it is about, which msgspec tells in no other way."""
    what, _, place = message.partition(" - at ")
    path = re.sub(r"^(`key` in )?`\$\.?(.*)`$", r"\2", place)
    root = re.split(r"[.\[]", path)[0]
    if root in NOTHING:
        return f"{root} is not supported by this server: leave it out, or null, or {NOTHING[root]}", root
    if named := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", what):
        field = f"{path}.{named[2]}" if path else named[2]
        return f"{field} is " + ("missing" if named[1].startswith("missing") else "not supported by this server"), field
    if (refused := re.fullmatch(r"Invalid enum value (.*)", what)) and path in SamplingParams.__struct_fields__:
        return f"{path} must be {SamplingParams.allowed(path)}, not {refused[1]}", path
    what = what[:1].lower() + what[1:]
    return (f"{path}: {what}", path) if path else (what, None)


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    """Takes the request's id, the decoded `body` if there is one, and the path's parameters."""
    answer: Any
    """The type of what the handler returns; None for plain text."""
    body: Any = None
    """The type of the request's body; None if there is none."""
    chunk: Any = None
    """The type of a stream's events, for endpoints that stream."""
    is_open: bool = False
    """No API key is asked for."""
    is_probe: bool = False
    """Asked over and over by what watches the service: such requests are not logged."""
    statuses: tuple[int, ...] = ()
    """Errors that it may answer with, beside those that all may."""

    @property
    def summary(self) -> str:
        """What it does: the first line of the handler's docstring."""
        return (self.handler.__doc__ or "").partition("\n")[0]


class Events:
    """An answer as a stream of server-sent events."""

    def __init__(self, chunks: AsyncGenerator[Iterable[msgspec.Struct]]):
        self.chunks = chunks

    async def encoded(self) -> AsyncGenerator[bytes]:
        """The events as they are sent, an error in place of the last one if the answer fails."""
        try:
            async with aclosing(self.chunks):
                async for structs in self.chunks:
                    if events := b"".join(b"data: " + _encode(struct) + b"\n\n" for struct in structs):
                        yield events
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status is sent already
            yield b"data: " + _encode(ErrorBody(error_of(error).detail)) + b"\n\n"


def make_app(
    endpoints: list[Endpoint],
    models: list[str],
    config: ApiConfig,
    observe: Callable[[str, int], None],
    log: RequestLog,
) -> Starlette:
    """The ASGI application; `observe` is told each answer's path and status, `log` each request's end."""
    keys = [key.encode() for key in config.api_keys]
    schema = _encode(openapi(endpoints, models, bool(keys)))

    def check_key(request: Request) -> None:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = [request.headers.get("x-api-key", ""), bearer if scheme.lower() == "bearer" else ""]
        sent = [key.encode("latin-1") for key in given]  # as it came
        is_known = any([hmac.compare_digest(key, known) for key in sent for known in keys])  # all, whichever fits
        if keys and not is_known:
            message = "give a valid API key: Authorization: Bearer KEY, or x-api-key: KEY"
            raise ApiError(401, message, code="invalid_api_key")

    async def read_body(request: Request) -> bytes:
        if (encoding := request.headers.get("content-encoding", "")).lower() not in ("", "identity"):
            raise ApiError(415, f"the body must be sent as it is, without content-encoding: {encoding}")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > config.max_body_bytes:
                raise ApiError(413, f"the body is larger than {config.max_body_bytes} bytes")
        return bytes(body)

    def route(endpoint: Endpoint) -> Route:
        decoder = msgspec.json.Decoder(endpoint.body) if endpoint.body else None
        path = re.sub(r"\{(\w+)\}", r"{\1:path}", endpoint.path)

        async def answer(request: Request) -> Response:
            record = log.begin(request.headers.get(REQUEST_ID, ""), endpoint.path)
            response = Response(status_code=499)  # unless it is answered
            try:
                if not endpoint.is_open:
                    check_key(request)
                arguments = dict(request.path_params)
                if decoder:
                    body = await read_body(request)
                    arguments["body"] = await aside(len(body), decode_body, body, decoder)
                response = _response(await endpoint.handler(record.id, **arguments))
            except ClientDisconnect:
                pass
            except Exception as error:
                response = _error_response(error_of(error))
            finally:
                if isinstance(response, StreamingResponse):
                    response.body_iterator = until_end(response.body_iterator, record, response.status_code)
                elif not endpoint.is_probe:
                    log.end(record, response.status_code)
            observe(endpoint.path, response.status_code)
            return response

        return Route(path, answer, methods=[endpoint.method])

    async def until_end(parts: Any, record: RequestRecord, status: int) -> AsyncIterator[bytes]:
        try:
            async with aclosing(parts):
                async for part in parts:
                    yield part
        finally:
            log.end(record, status)

    async def describe(request: Request) -> Response:
        return Response(schema, media_type="application/json")

    async def refuse(request: Request, error: Exception) -> Response:
        response = _error_response(error_of(error), getattr(error, "headers", None))
        log.end(log.begin(request.headers.get(REQUEST_ID, ""), request.url.path), response.status_code)
        observe("", response.status_code)
        return response

    routes = [Route("/openapi.json", describe), *map(route, endpoints)]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID, "retry-after"],
    )
    middleware = [cors] if config.allowed_origins else []
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: refuse})


def _response(answer: Any) -> Response:
    if isinstance(answer, Response):
        return answer
    if isinstance(answer, Events):
        return StreamingResponse(
            answer.encoded(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
    return Response(_encode(answer), media_type="application/json")


def _error_response(error: ApiError, headers: Any = None) -> Response:
    headers = dict(headers or {})
    if error.status in RETRY_AFTER_S:
        headers["retry-after"] = RETRY_AFTER_S[error.status]
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(_encode(ErrorBody(error.detail)), error.status, headers, "application/json")


# ---- OpenAPI


def openapi(endpoints: list[Endpoint], models: list[str], asks_for_keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 description of the endpoints."""
    types = [t for e in endpoints for t in (e.body, e.answer, e.chunk) if t is not None]
    types = list(dict.fromkeys([*types, ErrorBody]))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    reference = dict(zip(types, schemas, strict=True))
    for endpoint in endpoints:
        if endpoint.body:
            model = components[endpoint.body.__name__]["properties"]["model"]
            model["anyOf"] = [{"type": "string", "enum": models}, {"type": "null"}]
    for name, component in components.items():
        if name.endswith(("Request", "Message")) and component.get("additionalProperties") is False:
            component["additionalProperties"] = {"type": "null"}  # says nothing, see `decode_body`
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        content = (
            {"application/json": {"schema": reference[endpoint.answer]}} if endpoint.answer else {"text/plain": {}}
        )
        if endpoint.chunk:
            what = f"JSON of the schema {endpoint.chunk.__name__}, or of ErrorBody; [DONE] in the last event"
            event = {"type": "object", "properties": {"data": {"type": "string", "description": what}}}
            content["text/event-stream"] = {"schema": event | {"required": ["data"]}}
        responses: dict[str, Any] = {"200": {"description": endpoint.summary, "content": content}}
        statuses = [*endpoint.statuses, 405, 500] + ([400, 413, 415] if endpoint.body else [])
        statuses += [401] if asks_for_keys and not endpoint.is_open else []
        for status in sorted(statuses):
            error = {"application/json": {"schema": reference[ErrorBody]}}
            responses[str(status)] = {"description": ERROR_STATUSES[status], "content": error}
        operation: dict[str, Any] = {"summary": endpoint.summary, "responses": responses}
        if names := re.findall(r"\{(\w+)\}", endpoint.path):
            text = {"type": "string", "minLength": 1}
            operation["parameters"] = [{"name": n, "in": "path", "required": True, "schema": text} for n in names]
        if endpoint.body:
            body = {"application/json": {"schema": reference[endpoint.body]}}
            operation["requestBody"] = {"required": True, "content": body}
        if endpoint.is_open:
            operation["security"] = []
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    schema: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "rayllm", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }
    if asks_for_keys:
        schema["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        schema["security"] = [{"bearer": []}, {"x-api-key": []}]
    return schema
