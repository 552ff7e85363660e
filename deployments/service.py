"""What the HTTP endpoints do: choose the model, tokenise, ask its engine, write the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.responses import PlainTextResponse

from deployments.answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Health,
    ModelCard,
    ModelList,
    Text,
    TokenizerInfo,
    Tokens,
    Version,
)
from deployments.completions import ChatWriter, CompletionWriter, Writer, without_output
from deployments.http import ApiError, Endpoint, Events
from deployments.metrics import RequestTimer, ServiceMetrics
from deployments.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, GenerationRequest, TokenizeRequest
from deployments.requests import chat_prompt, chat_size, chat_text, encode_prompts, grammar_field_of, params_of, size_of
from rayllm import __version__
from rayllm.errors import EngineDeadError, UsageError
from rayllm.frontend.aside import aside
from rayllm.frontend.client import Client
from rayllm.frontend.grammar import grammar_of
from rayllm.frontend.output import Increment, joined
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.sampling_params import MAX_CHOICES, SamplingParams


class EngineState(Protocol):
    """What is known of a model's engines."""

    @property
    def trouble(self) -> str | None:
        """Why there is no engine now; None while there is one."""


@dataclass(frozen=True)
class Model:
    """A model that is served."""

    name: str
    """What requests call it."""
    client: Client
    tokenizer: Tokenizer
    state: EngineState
    created: int
    """When this process began to serve it, in seconds since 1970."""
    aliases: tuple[str, ...] = ()
    """Other names that requests may use."""

    def card(self, name: str) -> ModelCard:
        """What `/v1/models` tells of it under one of its names."""
        return ModelCard(id=name, created=self.created, max_model_len=self.client.max_model_len)


class Service:
    """The models of one application, for HTTP and for Python alike."""

    def __init__(self, models: list[Model], metrics: ServiceMetrics):
        self.models = {name: model for model in models for name in (model.name, *model.aliases)}
        """By all names."""
        self.metrics = metrics
        self.is_draining = False
        """Whether new requests are refused, since the service is about to end."""
        self.num_running = 0
        """Requests that are being answered."""

    def model(self, name: str | None) -> Model:
        """The model of this name, without one the only one; raises `ApiError` (404) for one that is not served."""
        if name is None and len({model.name for model in self.models.values()}) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise ApiError(400, f"model is missing: use one of {', '.join(self.models)}", "model")
        if (model := self.models.get(name)) is None:
            served = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name!r} here: use {served}", "model", "model_not_found")
        return model

    async def generate(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        cache_salt: str | None = None,
        field: str = "prompt",
        grammar_field: str = "structured_outputs",
    ) -> AsyncGenerator[Increment]:
        """`Client.answer`, refused while there is no engine, and measured; `field`: what brought the prompts,
        `grammar_field`: what brought `params.structured_outputs`.

        Raises `UsageError` for prompts that cannot be served with `params`, `QueueFullError` when too much waits for
        the engine, and `EngineDeadError` when there is none, or none any more.
        """
        if len(prompts) * params.n > MAX_CHOICES:
            raise UsageError(
                f"n must be at most {MAX_CHOICES} over all prompts, not {len(prompts)} times {params.n}", "n"
            )
        if params.structured_outputs is not None:
            await asyncio.to_thread(grammar_of, params.structured_outputs, grammar_field)
        for prompt in prompts:
            model.client.check(prompt, params, field)
        if self.is_draining:
            raise EngineDeadError("the service is shutting down")
        if model.state.trouble:
            raise EngineDeadError(f"{model.name} is not available: {model.state.trouble}")
        self.num_running += 1
        try:
            with RequestTimer(self.metrics, model.name, prompts) as timer:
                async with aclosing(model.client.answer(prompts, params, cache_salt)) as increments:
                    async for increment in increments:
                        timer.add(increment)
                        yield increment
        finally:
            self.num_running -= 1

    # ---- completions

    async def chat(self, request_id: str, body: ChatRequest) -> ChatCompletion | Events:
        """Answers a conversation.

        Returns a `ChatCompletion`, or with `stream` events of `ChatChunk`. Raises what `model` and `generate` raise,
        and `UsageError` for fields that contradict each other and for messages that the chat template refuses.
        """
        model = self.model(body.model)
        params = params_of(body, model.client)
        size = chat_size(body.messages)
        prompts = [await aside(size, chat_prompt, body, model.client, model.tokenizer)]
        writer = ChatWriter(body, body.model or model.name, prompts, model.tokenizer, request_id)
        increments = self.generate(model, prompts, params, body.cache_salt, "messages", grammar_field_of(body))
        return await _complete(increments, body, writer)

    async def complete(self, request_id: str, body: CompletionRequest) -> Completion | Events:
        """Continues prompts.

        Returns a `Completion`, or with `stream` events of the same type. Raises what `model` and `generate` raise,
        and `UsageError` for fields that contradict each other and for what is no prompt.
        """
        model = self.model(body.model)
        params = params_of(body, model.client)
        prompts = await aside(size_of(body.prompt), encode_prompts, body.prompt, model.client)
        writer = CompletionWriter(body, body.model or model.name, prompts, model.tokenizer, request_id)
        increments = self.generate(model, prompts, params, body.cache_salt, grammar_field=grammar_field_of(body))
        return await _complete(without_output(increments) if body.max_tokens == 0 else increments, body, writer)

    # ---- the rest

    async def list_models(self, request_id: str) -> ModelList:
        """Lists the models that are served."""
        return ModelList([model.card(name) for name, model in self.models.items()])

    async def show_model(self, request_id: str, model: str) -> ModelCard:
        """Describes one model.

        Raises `ApiError` (404) for one that is not served.
        """
        return self.model(model).card(model)

    async def tokenize(self, request_id: str, body: TokenizeRequest) -> Tokens:
        """Turns a text, or a conversation, into token ids.

        Raises `ApiError` (400, 404), and `UsageError` for messages that the chat template refuses.
        """
        model = self.model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        tokenizer = model.tokenizer
        if body.messages is not None:
            text = await aside(chat_size(body.messages), chat_text, body.messages, body.chat_template_kwargs, tokenizer)
            tokens = await aside(len(text), tokenizer.encode, text, add_special_tokens=False)
        else:
            text = body.prompt or ""
            tokens = await aside(len(text), tokenizer.encode, text, body.add_special_tokens is not False)
        return Tokens(tokens, len(tokens), model.client.max_model_len)

    async def tokenizer_info(self, request_id: str) -> TokenizerInfo:
        """Tells of the tokenizer of the only model that is served.

        Raises `ApiError` (400) if there are several.
        """
        model = self.model(None)
        special, template = model.tokenizer.special_tokens, model.tokenizer.chat_template
        return TokenizerInfo(**special, chat_template=template, model_max_length=model.client.max_model_len)

    async def detokenize(self, request_id: str, body: DetokenizeRequest) -> Text:
        """Turns token ids into text, special tokens included.

        Raises `ApiError` (404).
        """
        tokenizer = self.model(body.model).tokenizer
        return Text(await aside(len(body.tokens), tokenizer.decode, body.tokens, skip_special_tokens=False))

    async def health(self, request_id: str) -> Health:
        """Tells whether every model can answer.

        Raises `EngineDeadError` if one cannot.
        """
        trouble = {model.name: model.state.trouble for model in self.models.values() if model.state.trouble}
        if self.is_draining:
            raise EngineDeadError("the service is shutting down")
        if trouble:
            raise EngineDeadError("; ".join(f"{name} is not available: {reason}" for name, reason in trouble.items()))
        return Health("ok", list(self.models))

    async def introduce(self, request_id: str) -> PlainTextResponse:
        """Says what this is, and where to look."""
        return PlainTextResponse(
            f"rayllm {__version__} serves OpenAI's API at /v1: /openapi.json describes it, /v1/models lists models, "
            "/health tells how it is.\n"
        )

    async def version(self, request_id: str) -> Version:
        """Tells the version of the service."""
        return Version(__version__)

    def endpoints(self) -> list[Endpoint]:
        """All of them but `/metrics`, which is the whole application's."""

        def get(path: str, handler: Any, answer: Any, **more: Any) -> Endpoint:
            return Endpoint("GET", path, handler, answer, **more)

        def post(path: str, handler: Any, answer: Any, body: Any, *statuses: int, chunk: Any = None) -> Endpoint:
            return Endpoint("POST", path, handler, answer, body, chunk, statuses=(404, *statuses))

        return [
            post("/v1/chat/completions", self.chat, ChatCompletion, ChatRequest, 429, 503, chunk=ChatChunk),
            post("/v1/completions", self.complete, Completion, CompletionRequest, 429, 503, chunk=Completion),
            get("/v1/models", self.list_models, ModelList),
            get("/v1/models/{model}", self.show_model, ModelCard, statuses=(404,)),
            post("/tokenize", self.tokenize, Tokens, TokenizeRequest),
            post("/detokenize", self.detokenize, Text, DetokenizeRequest),
            get("/tokenizer_info", self.tokenizer_info, TokenizerInfo, statuses=(400,)),
            *(
                Endpoint(method, path, self.health, Health, is_open=True, is_probe=True, statuses=(503,))
                for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"))
            ),
            get("/", self.introduce, None, is_open=True),
            get("/version", self.version, Version, is_open=True),
        ]


async def _complete(increments: AsyncGenerator[Increment], body: GenerationRequest, writer: Writer[Any]) -> Any:
    if not body.stream:
        choices = await joined(increments)
        return await aside(writer.size(choices), writer.whole, choices)
    first = await anext(increments)  # from here on, there is no other status to be given
    return Events(_events(first, increments, writer))


async def _events(
    first: Increment, increments: AsyncGenerator[Increment], writer: Writer[Any]
) -> AsyncGenerator[Iterable[msgspec.Struct]]:
    try:
        writer.count(first)
        yield await aside(writer.size([first]), lambda: list(writer.chunks(first)))
        async for increment in increments:
            writer.count(increment)
            yield await aside(writer.size([increment]), list, writer.chunks(increment))
        yield writer.last_chunks()
    finally:
        await increments.aclose()
