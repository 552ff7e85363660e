"""What the HTTP endpoints do: choose the model, tokenise, ask its engine, write the answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from deployments.completions import ChatWriter, CompletionWriter, Writer, chat_prompt, joined, params_of, prompts_of
from deployments.http import ApiError, Endpoint, Events
from deployments.metrics import RequestTimer, ServiceMetrics
from deployments.protocol import (
    MAX_CHOICES,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    Health,
    ModelCard,
    ModelList,
    Text,
    TokenizeRequest,
    Tokens,
    Version,
)
from rayllm import __version__
from rayllm.errors import EngineDeadError, UsageError
from rayllm.frontend.client import Client
from rayllm.frontend.output import Increment
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.sampling_params import SamplingParams


class EngineState(Protocol):
    """What is known of a model's engines."""

    @property
    def trouble(self) -> str | None:
        """Why there is no engine now; None while there is one."""


@dataclass(frozen=True)
class Model:
    """A model that is served."""

    name: str
    client: Client
    tokenizer: Tokenizer
    state: EngineState
    created: int

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.name, created=self.created, max_model_len=self.client.max_model_len)


class Service:
    """The models of one application, for HTTP and for Python alike."""

    def __init__(self, models: list[Model], metrics: ServiceMetrics):
        self.models = {model.name: model for model in models}
        self.metrics = metrics
        self.is_draining = False
        self.num_running = 0

    def model(self, name: str) -> Model:
        """Raises `ApiError` for a name that is not served."""
        if (model := self.models.get(name)) is None:
            served = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name!r} here: use {served}", "model", "model_not_found")
        return model

    async def generate(
        self, model: Model, prompts: Sequence[Sequence[int]], params: SamplingParams, cache_salt: str | None = None
    ) -> AsyncGenerator[Increment]:
        """`Client.answer`, refused while there is no engine, and measured."""
        if len(prompts) * params.n > MAX_CHOICES:
            raise UsageError(f"n must be at most {MAX_CHOICES} over all prompts, not {len(prompts)} times {params.n}")
        for prompt in prompts:
            model.client.check(prompt, params)
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

    async def chat(self, request_id: str, body: ChatRequest) -> Any:
        model = self.model(body.model)
        params = params_of(body)
        prompts = [chat_prompt(body.messages, body.chat_template_kwargs, model.tokenizer)]
        return await self._complete(
            model, prompts, params, body, ChatWriter(body, prompts, model.tokenizer, request_id)
        )

    async def complete(self, request_id: str, body: CompletionRequest) -> Any:
        model = self.model(body.model)
        params = params_of(body)
        prompts = [p if isinstance(p, list) else model.tokenizer.encode(p) for p in prompts_of(body.prompt)]
        writer = CompletionWriter(body, prompts, model.tokenizer, request_id)
        return await self._complete(model, prompts, params, body, writer)

    async def _complete(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        body: GenerationRequest,
        writer: Writer[Any],
    ) -> Any:
        increments = self.generate(model, prompts, params, body.cache_salt)
        if body.stream:
            first = await anext(increments)  # from here on, there is no other status to be given
            return Events(_events(first, increments, writer))
        choices: dict[int, list[Increment]] = {}
        async for increment in increments:
            writer.count(increment)
            choices.setdefault(increment.index, []).append(increment)
        return writer.whole([joined(choices[index]) for index in sorted(choices)])

    # ---- the rest

    async def list_models(self, request_id: str) -> ModelList:
        return ModelList([model.card for model in self.models.values()])

    async def show_model(self, request_id: str, model: str) -> ModelCard:
        return self.model(model).card

    async def tokenize(self, request_id: str, body: TokenizeRequest) -> Tokens:
        model = self.model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if body.messages is not None:
            tokens = chat_prompt(body.messages, body.chat_template_kwargs, model.tokenizer)
        else:
            tokens = model.tokenizer.encode(body.prompt or "", body.add_special_tokens)
        return Tokens(tokens, len(tokens), model.client.max_model_len)

    async def detokenize(self, request_id: str, body: DetokenizeRequest) -> Text:
        return Text(self.model(body.model).tokenizer.decode(body.tokens, skip_special_tokens=False))

    async def health(self, request_id: str) -> Health:
        trouble = {name: model.state.trouble for name, model in self.models.items() if model.state.trouble}
        if self.is_draining:
            raise EngineDeadError("the service is shutting down")
        if trouble:
            raise EngineDeadError("; ".join(f"{name} is not available: {reason}" for name, reason in trouble.items()))
        return Health("ok", list(self.models))

    async def version(self, request_id: str) -> Version:
        return Version(__version__)

    def endpoints(self) -> list[Endpoint]:
        answers = (404, 429, 503)
        return [
            Endpoint(
                "POST",
                "/v1/chat/completions",
                "Answer a conversation",
                self.chat,
                ChatCompletion,
                ChatRequest,
                ChatChunk,
                statuses=answers,
            ),
            Endpoint(
                "POST",
                "/v1/completions",
                "Continue prompts",
                self.complete,
                Completion,
                CompletionRequest,
                Completion,
                statuses=answers,
            ),
            Endpoint("GET", "/v1/models", "The models that are served", self.list_models, ModelList),
            Endpoint("GET", "/v1/models/{model}", "One model", self.show_model, ModelCard, statuses=(404,)),
            Endpoint("POST", "/tokenize", "Text to token ids", self.tokenize, Tokens, TokenizeRequest, statuses=(404,)),
            Endpoint(
                "POST", "/detokenize", "Token ids to text", self.detokenize, Text, DetokenizeRequest, statuses=(404,)
            ),
            Endpoint(
                "GET", "/health", "Whether every model can answer", self.health, Health, is_open=True, statuses=(503,)
            ),
            Endpoint("GET", "/version", "The version of the service", self.version, Version, is_open=True),
        ]


async def _events(
    first: Increment, increments: AsyncGenerator[Increment], writer: Writer[Any]
) -> AsyncIterator[Iterable[msgspec.Struct]]:
    try:
        writer.count(first)
        yield writer.chunks(first)
        async for increment in increments:
            writer.count(increment)
            yield writer.chunks(increment)
        yield writer.last_chunks()
    finally:
        await increments.aclose()
