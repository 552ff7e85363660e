"""From requests to prompts and sampling parameters."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec

from deployments.protocol import (
    MAX_PROMPTS,
    AssistantMessage,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Content,
    GenerationRequest,
    JsonSchemaFormat,
    TextFormat,
)
from rayllm.errors import UsageError
from rayllm.frontend.client import Client
from rayllm.frontend.tokenizer import Tokenizer
from rayllm.sampling_params import SamplingParams, StructuredOutputs

SAME_FIELDS = [
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "snapkv_limit"),
]
"""Fields that requests and `SamplingParams` have in common."""

TEMPLATE_SWITCHES = ("continue_final_message", "add_generation_prompt")
"""What of transformers' own arguments a request may set in `chat_template_kwargs`."""


def params_of(request: GenerationRequest, client: Client) -> SamplingParams:
    """The sampling parameters of a request; raises `UsageError` for what no single field's type can tell."""
    given = {name: value for name in SAME_FIELDS if (value := getattr(request, name)) is not None}
    if (structured := _structured_outputs(request)) is not None:
        given["structured_outputs"] = structured
    if request.stream_options is not None and not request.stream:
        raise UsageError("stream_options must be left out unless stream is true", "stream_options")
    if isinstance(request, CompletionRequest):
        given["logprobs"] = request.logprobs
        if request.echo:
            given["prompt_logprobs"] = request.logprobs
        if request.max_tokens == 0:
            if not request.echo:
                raise UsageError("max_tokens must be at least 1 unless echo is true", "max_tokens")
            given["max_tokens"] = 1  # which is left out of the answer
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise UsageError("best_of is not supported by this server: leave it out, or as n", "best_of")
        return client.sampling_params(given)
    assert isinstance(request, ChatRequest)
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise UsageError("max_tokens and max_completion_tokens are the same limit: give one", "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise UsageError("top_logprobs must be left out unless logprobs is true", "top_logprobs")
    given["max_tokens"] = limits.pop() if limits else None
    given["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    return client.sampling_params(given)


def _structured_outputs(request: GenerationRequest) -> StructuredOutputs | None:
    wanted = request.response_format
    if wanted is None or isinstance(wanted, TextFormat):
        return request.structured_outputs
    if request.structured_outputs is not None:
        raise UsageError("response_format and structured_outputs say the same: give one", "response_format")
    if isinstance(wanted, JsonSchemaFormat) and wanted.json_schema.schema is not None:
        return StructuredOutputs(json=wanted.json_schema.schema)
    return StructuredOutputs(json_object=True)


def grammar_field_of(request: GenerationRequest) -> str:
    """The field that says what the answer must be, for an error message."""
    return "response_format" if request.structured_outputs is None else "structured_outputs"


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


def encode_prompts(prompt: Any, client: Client) -> list[list[int]]:
    """A request's `prompt` as lists of token ids; raises `UsageError`."""
    return [one if isinstance(one, list) else client.encode(one) for one in prompts_of(prompt)]


def size_of(prompt: Any) -> int:
    """About how much work a request's `prompt` is, for `aside`."""
    if not isinstance(prompt, list):
        return len(prompt) if isinstance(prompt, str) else 0
    return len(prompt) + sum(len(one) for one in prompt[:MAX_PROMPTS] if isinstance(one, str | list))


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def chat_size(messages: Sequence[ChatMessage]) -> int:
    """About how much work a conversation is, for `aside`."""
    return sum(len(_text(message.content)) + 100 for message in messages)


def chat_text(messages: Sequence[ChatMessage], template_kwargs: dict[str, Any] | None, tokenizer: Tokenizer) -> str:
    """A conversation in the model's chat template; raises `UsageError`."""
    kwargs = template_kwargs or {}
    if reserved := sorted(kwargs.keys() & _reserved_names()):
        raise UsageError(
            f"chat_template_kwargs must be variables of the template, not {', '.join(reserved)}", "chat_template_kwargs"
        )
    return tokenizer.apply_chat_template([_plain(message) for message in messages], kwargs)


def chat_prompt(request: ChatRequest, client: Client, tokenizer: Tokenizer) -> list[int]:
    """The token ids of the conversation to answer; raises `UsageError`."""
    variables = {"verbosity": request.verbosity} if request.verbosity else {}
    text = chat_text(request.messages, variables | (request.chat_template_kwargs or {}), tokenizer)
    return client.encode(text, "messages", add_special_tokens=False)


@cache
def _reserved_names() -> set[str]:
    """What transformers' own function takes beside the template's variables; a template of the client's among it."""
    from transformers import PreTrainedTokenizerBase

    known = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return (set(known) | {"messages"}) - {"kwargs", *TEMPLATE_SWITCHES}


def _plain(message: ChatMessage) -> dict[str, Any]:
    plain = {"role": message.__struct_config__.tag, "content": _text(message.content)}
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    for name in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, name, None):
            plain[name] = value
    return plain


def _text(content: Content | None) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content or ())
