"""From increments to OpenAI's answers, whole or in chunks."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from deployments.answers import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Delta,
    TokenDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from deployments.protocol import ChatRequest, CompletionRequest, GenerationRequest
from deployments.requests import prompts_of
from rayllm.frontend.output import Increment
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.messages.step import Logprobs

R = TypeVar("R", bound=GenerationRequest)


async def without_output(increments: AsyncGenerator[Increment]) -> AsyncGenerator[Increment]:
    """The increments of prompts that are only scored: the token that an engine samples at least is left out."""
    async with aclosing(increments):
        async for increment in increments:
            reason = "length" if increment.finish_reason else None
            yield dataclasses.replace(
                increment, text="", token_ids=[], logprobs=[], text_offsets=[], finish_reason=reason, stop_reason=None
            )


class Writer(Generic[R]):
    """Turns the increments of one request into its answer. One subclass for each kind of completion."""

    prefix: str

    def __init__(self, request: R, model: str, prompts: Sequence[list[int]], tokenizer: Tokenizer, request_id: str):
        self.request = request
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{request_id or uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.num_output_tokens = 0
        self._cached: dict[int, int] = {}
        self._pruned: dict[int, int] = {}
        options = request.stream_options
        self._includes_usage = bool(options and options.include_usage)
        self._counts_on = bool(options and options.continuous_usage_stats)

    def usage(self) -> Usage:
        """Tokens of the prompts and of the output that was counted so far."""
        prompt_tokens = sum(map(len, self.prompts))
        total = prompt_tokens + self.num_output_tokens
        details = TokenDetails(sum(self._cached.values()), sum(self._pruned.values()))
        return Usage(prompt_tokens, self.num_output_tokens, total, details)

    def count(self, increment: Increment) -> None:
        """Adds an increment's tokens to the usage."""
        self.num_output_tokens += len(increment.token_ids)
        n = self.request.n or 1
        if increment.index % n == 0:  # a prompt's other choices find what this one computed
            self._cached.setdefault(increment.index // n, increment.num_cached_tokens)
            self._pruned.setdefault(increment.index // n, increment.num_pruned_tokens)

    def chunk_usage(self) -> dict[str, Any]:
        """The field `usage` of a chunk that is not the last: null where only the last one has it, absent where none."""
        if self._counts_on:
            return {"usage": self.usage()}
        return {"usage": None} if self._includes_usage else {}

    def size(self, increments: Iterable[Increment]) -> int:
        """About how much work it is to write these, for `aside`."""
        return sum(
            len(entry.token_ids)
            for increment in increments
            for entry in (*increment.logprobs, *increment.prompt_logprobs)
        )

    def chunks(self, increment: Increment) -> Iterable[msgspec.Struct]:
        """What a stream sends for one increment."""
        raise NotImplementedError

    def last_chunks(self) -> Iterable[msgspec.Struct]:
        """What a stream sends at its end."""
        if self._includes_usage:
            yield self.chunk([], usage=self.usage())

    def chunk(self, choices: list[Any], **fields: Any) -> msgspec.Struct:
        """A piece of the answer with its head."""
        raise NotImplementedError

    def whole(self, choices: list[Increment]) -> msgspec.Struct:
        """The answer in one piece, of choices in order, each one increment; counts them."""
        for choice in choices:
            self.count(choice)
        return self._whole(choices)

    def _whole(self, choices: list[Increment]) -> msgspec.Struct:
        raise NotImplementedError


TokenInText = tuple[int, int, Logprobs | None]
"""A token's id, where it begins in the text, and what is known of its place: nothing of a prompt's first."""


class EchoedPrompt(NamedTuple):
    """A prompt as its answer repeats it: as it was given, with the tokens that it became and where they begin."""

    text: str
    token_ids: list[int]
    offsets: list[int]


class CompletionWriter(Writer[CompletionRequest]):
    """Writes continuations, after their prompts if the request says `echo`."""

    prefix = "cmpl"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._lengths: dict[int, int] = {}
        """How long the text before each answer is, by the index of each choice that was begun."""
        self._echoes: dict[int, EchoedPrompt] = {}
        """By the number of the prompt."""

    def size(self, increments: Iterable[Increment]) -> int:
        increments = list(increments)
        new = [increment for increment in increments if self.request.echo and increment.index not in self._lengths]
        return super().size(increments) + sum(increment.num_prompt_tokens for increment in new)

    def chunk(self, choices: list[CompletionChoice], **fields: Any) -> Completion:
        return Completion(**self.head, choices=choices, **fields)

    def chunks(self, increment: Increment) -> Iterable[Completion]:
        is_empty = not (increment.text or increment.logprobs or increment.finish_reason)
        if not is_empty or (self.request.echo and increment.index not in self._lengths):
            yield self.chunk([self._choice(increment)], **self.chunk_usage())

    def _whole(self, choices: list[Increment]) -> Completion:
        return self.chunk([self._choice(choice) for choice in choices], usage=self.usage())

    def _choice(self, increment: Increment) -> CompletionChoice:
        index, echoed = increment.index, None
        if index not in self._lengths:
            echoed = self._echoed(index // (self.request.n or 1)) if self.request.echo else None
            self._lengths[index] = len(echoed.text) if echoed else 0
        logprobs = None
        if self.request.logprobs is not None:
            tokens: list[TokenInText] = []
            if echoed:
                tokens += zip(echoed.token_ids, echoed.offsets, [None, *increment.prompt_logprobs], strict=True)
            for offset, entry in zip(increment.text_offsets, increment.logprobs, strict=True):
                tokens.append((entry.token_ids[0], self._lengths[index] + offset, entry))
            logprobs = self._logprobs(tokens)
        return CompletionChoice(
            index=index,
            text=echoed.text + increment.text if echoed else increment.text,
            logprobs=logprobs,
            finish_reason=increment.finish_reason,  # type: ignore[arg-type]
            stop_reason=increment.stop_reason,
        )

    def _echoed(self, number: int) -> EchoedPrompt:
        if number in self._echoes:
            return self._echoes[number]
        given, token_ids = prompts_of(self.request.prompt)[number], self.prompts[number]
        is_added = self.tokenizer.added(given) if isinstance(given, str) else [False] * len(token_ids)
        detokenizer = self.tokenizer.detokenizer(skip_special_tokens=False)
        text, offsets = "", []
        for token_id, is_not_given in zip(token_ids, is_added, strict=True):
            offsets.append(len(text))
            text += "" if is_not_given else detokenizer.add([token_id])
        if isinstance(given, str):  # what the tokenizer made of it may be spelled otherwise
            text, offsets = given, [min(offset, len(given)) for offset in offsets]
        self._echoes[number] = EchoedPrompt(text, token_ids, offsets)
        return self._echoes[number]

    def _logprobs(self, tokens: list[TokenInText]) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[self._name(token_id) for token_id, _, _ in tokens],
            token_logprobs=[entry.logprobs[0] if entry else None for _, _, entry in tokens],
            top_logprobs=[self._by_name(entry) if entry else None for _, _, entry in tokens],
            text_offset=[offset for _, offset, _ in tokens],
        )

    def _by_name(self, entry: Logprobs) -> dict[str, float]:
        """The log-probabilities of a place's token and of the likeliest ones; of two that spell alike, the later is
        called by its id."""
        named: dict[str, float] = {}
        for token_id, logprob in dict(zip(entry.token_ids, entry.logprobs, strict=True)).items():
            name = self._name(token_id)
            named[name if name not in named else f"token_id:{token_id}"] = logprob
        return named

    def _name(self, token_id: int) -> str:
        """A token's text, or its bytes in OpenAI's form if they are no whole characters."""
        spelled = self.tokenizer.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class ChatWriter(Writer[ChatRequest]):
    """Writes a conversation's answers."""

    prefix = "chatcmpl"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._begun: set[int] = set()

    def chunk(self, choices: list[ChunkChoice], **fields: Any) -> ChatChunk:
        return ChatChunk(**self.head, choices=choices, **fields)

    def chunks(self, increment: Increment) -> Iterable[ChatChunk]:
        index, logprobs = increment.index, self._logprobs(increment.logprobs)
        deltas = []
        if index not in self._begun:
            self._begun.add(index)
            deltas.append(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
        if increment.text or logprobs:
            deltas.append(ChunkChoice(index=index, delta=Delta(content=increment.text), logprobs=logprobs))
        if increment.finish_reason:
            deltas.append(
                ChunkChoice(
                    index=index,
                    delta=Delta(),
                    finish_reason=increment.finish_reason,  # type: ignore[arg-type]
                    stop_reason=increment.stop_reason,
                )
            )
        for choice in deltas:
            yield self.chunk([choice], **self.chunk_usage())

    def _whole(self, choices: list[Increment]) -> ChatCompletion:
        return ChatCompletion(**self.head, choices=[self._choice(choice) for choice in choices], usage=self.usage())

    def _choice(self, increment: Increment) -> ChatChoice:
        return ChatChoice(
            index=increment.index,
            message=AnswerMessage(increment.text),
            logprobs=self._logprobs(increment.logprobs),
            finish_reason=increment.finish_reason,  # type: ignore[arg-type]
            stop_reason=increment.stop_reason,
        )

    def _logprobs(self, entries: list[Logprobs]) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        content = []
        for entry in entries:
            own, *top = (
                TopLogprob(self.tokenizer.token_text(token_id), logprob, list(self.tokenizer.token_bytes(token_id)))
                for token_id, logprob in zip(entry.token_ids, entry.logprobs, strict=True)
            )
            content.append(TokenLogprob(own.token, own.logprob, own.bytes, top))
        return ChatLogprobs(content)
