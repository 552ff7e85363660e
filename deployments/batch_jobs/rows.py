"""What a row of a batch job asks for, and what can be said of all rows before an engine starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from deployments.batch_jobs.input import JobInput, read_lines
from deployments.bodies import decode_body
from deployments.http import ApiError, error_of
from deployments.protocol import ChatRequest, CompletionRequest
from deployments.requests import chat_text, prompts_of
from rayllm.errors import UsageError
from rayllm.frontend.tokenizer import Tokenizer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, type[ChatRequest] | type[CompletionRequest]] = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest}
DECODERS: dict[str, Any] = {url: msgspec.json.Decoder(body) for url, body in BODIES.items()}
NAMES = ("custom_id", "id")
"""Fields of a row that name it."""


def request_of(row: bytes, model: str) -> tuple[str, ChatRequest | CompletionRequest]:
    """The endpoint that a row's JSON asks for, and the request; `model` where it names none.

    Raises `ApiError` and msgspec's errors, as a request to the service does.
    """
    try:
        return _request_of(row, model)
    except RecursionError:
        raise ApiError(400, "the row is nested too deeply") from None


def _request_of(row: bytes, model: str) -> tuple[str, ChatRequest | CompletionRequest]:
    try:
        fields = msgspec.json.decode(row)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the row is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "a row must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in NAMES:
        if not isinstance(fields.pop(name, ""), str | int):
            raise ApiError(400, f"{name} must be a text", name)
    if "body" in fields:
        url, method, body = fields.pop("url", None), fields.pop("method", "POST"), fields.pop("body")
        if unknown := next(iter(fields), None):
            raise ApiError(400, f"{unknown} must be in the body, or left out", unknown)
        if isinstance(body, str):  # in Parquet, where columns have one type
            body = msgspec.json.decode(body)
        if not isinstance(url, str) or url not in BODIES or method != "POST":
            raise ApiError(400, f"method and url must be POST {CHAT} or {COMPLETIONS}, not {method} {url}", "url")
    else:
        body = fields
        if ("prompt" in body) == ("messages" in body):
            raise ApiError(400, "a row must have a body, a prompt or messages: one of them", "prompt")
        url = CHAT if "messages" in body else COMPLETIONS
    if not isinstance(body, dict):
        raise ApiError(400, "body must be a JSON object", "body")
    if body.get("stream"):
        raise ApiError(400, "stream must be left out in a batch job", "stream")
    return url, decode_body(msgspec.json.encode({"model": model} | body), DECODERS[url])


def check_rows(found: JobInput, names: Iterable[str], tokenizer: Tokenizer) -> None:
    """Raises `UsageError` for what every row would be told alike: that it asks for another model than one of `names`,
    or, if not a single row is right, what is wrong with the first."""
    [name, *others] = names
    for model, key in found.models.items():
        if model not in (name, *others):
            raise UsageError(
                f"the row {key} asks for the model {model!r}, but this job's is {name!r}: leave model out of the rows, "
                "or name the job's with served_model_name",
                "served_model_name",
            )
    if not found.rows:
        raise UsageError("there are no rows in the input", "input")
    first: str | None = None
    for line in read_lines(found.rows):
        if (wrong := _wrong(line, name, tokenizer)) is None:
            return
        first = first or wrong
    raise UsageError(
        f"not one of the {len(found.rows)} rows can be answered; the first, {found.rows[0].key}: {first}", "input"
    )


def _wrong(line: bytes, model: str, tokenizer: Tokenizer) -> str | None:
    """What is wrong with a row, as far as can be said without an engine; None if nothing is."""
    try:
        _, request = request_of(line, model)
        if isinstance(request, ChatRequest):
            chat_text(request.messages, request.chat_template_kwargs, tokenizer)
        else:
            prompts_of(request.prompt)
    except Exception as error:
        return error_of(error).detail.message
    return None
