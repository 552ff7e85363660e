"""From requests to prompts and sampling parameters, and from increments to OpenAI's answers, whole or in chunks."""

from __future__ import annotations

import inspect
import time
import uuid
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Generic, TypeVar

import msgspec

from deployments.protocol import (
    MAX_PROMPTS,
    AnswerMessage,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Content,
    Delta,
    GenerationRequest,
    TokenDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from rayllm.errors import UsageError
from rayllm.frontend.output import Increment
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.messages.step import Logprobs
from rayllm.sampling_params import SamplingParams

R = TypeVar("R", bound=GenerationRequest)

SAME_FIELDS = [
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "snapkv_limit"),
]
"""Fields that requests and `SamplingParams` have in common."""

TEMPLATE_SWITCHES = ("continue_final_message", "add_generation_prompt")
"""What of transformers' own arguments a request may set in `chat_template_kwargs`."""

# ---- requests


def params_of(request: GenerationRequest) -> SamplingParams:
    """The sampling parameters of a request; raises `UsageError` for what no single field's type can tell."""
    given = {name: value for name in SAME_FIELDS if (value := getattr(request, name)) is not None}
    if request.stream_options is not None and not request.stream:
        raise UsageError("stream_options must be left out unless stream is true", "stream_options")
    if isinstance(request, CompletionRequest):
        given["logprobs"] = request.logprobs
        if request.echo:
            given["prompt_logprobs"] = request.logprobs
        return SamplingParams(**given)
    assert isinstance(request, ChatRequest)
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise UsageError("max_tokens and max_completion_tokens are the same limit: give one", "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise UsageError("top_logprobs must be left out unless logprobs is true", "top_logprobs")
    given["max_tokens"] = limits.pop() if limits else None
    given["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    return SamplingParams(**given)


def prompts_of(prompt: Any) -> list[str] | list[list[int]]:
    """A request's `prompt` as a list of prompts, all texts or all token ids; raises `UsageError`."""
    if isinstance(prompt, str) or (_is_list_of(prompt, int) and prompt):
        prompt = [prompt]
    is_list = _is_list_of(prompt, str) or (_is_list_of(prompt, list) and all(_is_list_of(one, int) for one in prompt))
    if not prompt or not is_list:
        raise UsageError("prompt must be a text, a list of token ids, or a list of such", "prompt")
    if len(prompt) > MAX_PROMPTS:
        raise UsageError(f"prompt must be at most {MAX_PROMPTS} prompts, not {len(prompt)}", "prompt")
    return list(prompt)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def chat_prompt(
    messages: Sequence[ChatMessage], template_kwargs: dict[str, Any] | None, tokenizer: Tokenizer
) -> list[int]:
    """The token ids of a conversation in the model's chat template; raises `UsageError`."""
    kwargs = template_kwargs or {}
    if reserved := sorted(kwargs.keys() & _reserved_names()):
        raise UsageError(
            f"chat_template_kwargs must be variables of the template, not {', '.join(reserved)}", "chat_template_kwargs"
        )
    return tokenizer.apply_chat_template([_plain(message) for message in messages], **kwargs)


@cache
def _reserved_names() -> set[str]:
    """What transformers' own function takes beside the template's variables; a template of the client's among it."""
    from transformers import PreTrainedTokenizerBase

    known = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return set(known) - {"kwargs", *TEMPLATE_SWITCHES}


def _plain(message: ChatMessage) -> dict[str, Any]:
    plain = {"role": message.__struct_config__.tag, "content": _text(message.content)}
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    for name in ("name", "tool_call_id"):
        if value := getattr(message, name, None):
            plain[name] = value
    return plain


def _text(content: Content | None) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content or ())


# ---- answers


class Writer(Generic[R]):
    """Turns the increments of one request into its answer. One subclass for each kind of completion."""

    prefix: str

    def __init__(self, request: R, prompts: Sequence[list[int]], tokenizer: Tokenizer, request_id: str):
        self.request = request
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{request_id or uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self.num_output_tokens = 0
        self._cached: dict[int, int] = {}
        self._pruned: dict[int, int] = {}
        self._includes_usage = bool(request.stream_options and request.stream_options.include_usage)

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
        """The field `usage` of a chunk that is not the last: null where the last one has it, else absent."""
        return {"usage": None} if self._includes_usage else {}

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


class CompletionWriter(Writer[CompletionRequest]):
    """Writes continuations, after their prompts if the request says `echo`."""

    prefix = "cmpl"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._offsets: dict[int, int] = {}

    def chunk(self, choices: list[CompletionChoice], **fields: Any) -> Completion:
        return Completion(**self.head, choices=choices, **fields)

    def chunks(self, increment: Increment) -> Iterable[Completion]:
        is_empty = not (increment.text or increment.logprobs or increment.finish_reason)
        if not is_empty or (self.request.echo and increment.index not in self._offsets):
            yield self.chunk([self._choice(increment)], **self.chunk_usage())

    def _whole(self, choices: list[Increment]) -> Completion:
        return self.chunk([self._choice(choice) for choice in choices], usage=self.usage())

    def _choice(self, increment: Increment) -> CompletionChoice:
        index = increment.index
        is_first = index not in self._offsets
        self._offsets.setdefault(index, 0)
        prompt = self.prompts[index // (self.request.n or 1)] if is_first and self.request.echo else []
        entries: list[Logprobs | None] = list(increment.logprobs)
        if prompt:
            entries = [None, *increment.prompt_logprobs, *entries]
        token_ids = prompt + increment.token_ids
        return CompletionChoice(
            index=index,
            text=self.tokenizer.decode(prompt) + increment.text,
            logprobs=self._logprobs(index, token_ids, entries) if self.request.logprobs is not None else None,
            finish_reason=increment.finish_reason,  # type: ignore[arg-type]
            stop_reason=increment.stop_reason,
        )

    def _logprobs(self, index: int, token_ids: list[int], entries: list[Logprobs | None]) -> CompletionLogprobs:
        text = self.tokenizer.token_text
        tokens = [text(token_id) for token_id in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[entry.logprobs[0] if entry else None for entry in entries],
            top_logprobs=[
                dict(zip(map(text, entry.token_ids[1:]), entry.logprobs[1:], strict=True)) if entry else None
                for entry in entries
            ],
            text_offset=offsets,
        )


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
