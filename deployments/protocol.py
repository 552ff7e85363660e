"""The HTTP bodies: OpenAI's chat completions and completions, and what goes with them.

The types are the one source of truth: bodies are decoded and encoded by them, and `/openapi.json` is made of them.
A field that is not here is refused by name, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from rayllm import sampling_params as sampling

# What a client may ask for is what `SamplingParams` take, except for these.
Temperature = Annotated[float, Meta(ge=0, le=2)]
"""As OpenAI has it: clients that send more mean something else."""
NumLogprobs = Annotated[int, Meta(ge=0, le=20)]
"""As OpenAI has it: each is spelled out as text in the answer."""
MAX_PROMPTS = 128
"""Prompts of one request."""
MAX_STOPS = 16
"""Stop strings, or stop tokens, of one request: each is looked for after every token."""
MAX_CHARS = 256
"""Longest stop string, and longest `cache_salt`."""

StopString = Annotated[str, Meta(min_length=1, max_length=MAX_CHARS)]
LogitBias = Annotated[
    sampling.LogitBias, Meta(extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}})
]


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """Base of requests."""


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool = False


class GenerationRequest(Body, kw_only=True):
    """What both kinds of completion take. A field that is null is as if it were absent."""

    model: str
    temperature: Temperature | None = None
    top_p: sampling.TopP | None = None
    n: sampling.NumChoices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    max_tokens: sampling.MaxTokens | None = None
    presence_penalty: sampling.Penalty | None = None
    frequency_penalty: sampling.Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: sampling.Seed | None = None
    user: str | None = None
    top_k: sampling.TopK | None = None
    min_p: sampling.MinP | None = None
    repetition_penalty: sampling.RepetitionPenalty | None = None
    min_tokens: sampling.MinTokens | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[sampling.TokenId], Meta(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    snapkv_limit: sampling.SnapkvLimit | None = None
    """Prompt tokens that keep their KV, where the model is served with SnapKV; "all": nothing is pruned."""
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_CHARS)] | None = None
    """Requests share cached prompts only with those of the same salt."""


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": MAX_PROMPTS}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
TOKEN_IDS: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}


class CompletionRequest(GenerationRequest, kw_only=True):
    """Prompts to continue."""

    prompt: Annotated[
        Any,
        Meta(
            description="A text, token ids, or a list of texts or of lists of token ids",
            extra_json_schema={"anyOf": [TEXT, TOKEN_IDS, _list_of(TEXT), _list_of(TOKEN_IDS)]},
        ),
    ]
    """Checked by `prompts_of`: a union of lists is beyond msgspec."""
    echo: bool | None = None
    logprobs: NumLogprobs | None = None


class TextPart(Body, tag_field="type", tag="text"):
    """A part of a message's content; there are no parts but text."""

    text: str


Content = str | list[TextPart]


class Function(Body):
    """The function that a tool call names, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that an earlier answer made."""

    id: str
    function: Function
    type: Literal["function"] = "function"


class Message(Body, kw_only=True, tag_field="role"):
    """Base of a conversation's messages, told apart by `role`."""

    name: str | None = None


class SystemMessage(Message, kw_only=True, tag="system"):
    """Instructions for the model."""

    content: Content


class DeveloperMessage(Message, kw_only=True, tag="developer"):
    """Instructions for the model, by their newer name."""

    content: Content


class UserMessage(Message, kw_only=True, tag="user"):
    """What the user says."""

    content: Content


class AssistantMessage(Message, kw_only=True, tag="assistant"):
    """Answers are sent back as they came, with the fields that this server leaves empty."""

    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Message, kw_only=True, tag="tool"):
    """What a tool that was called returned."""

    content: Content
    tool_call_id: str


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


class ChatRequest(GenerationRequest, kw_only=True):
    """A conversation to answer."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: sampling.MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Body):
    """`prompt`, or `messages` through the chat template."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """Token ids to turn into text."""

    model: str
    tokens: list[sampling.TokenId]


# ---- answers


class TokenDetails(msgspec.Struct):
    """Prompt tokens whose KV came from the prefix cache, and prompt tokens whose KV was pruned."""

    cached_tokens: int
    pruned_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


FinishReason = Literal["stop", "length"]


class CompletionLogprobs(msgspec.Struct):
    """Entries of equal length; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One continuation, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Completion(msgspec.Struct, kw_only=True):
    """The answer to a `CompletionRequest`, or one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(msgspec.Struct):
    """A token that was likely, with its log-probability and its UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """A token of the answer, and the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(msgspec.Struct):
    """What the model says."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer to a `ChatRequest`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct):
    """What is new of a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    """What is new of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of the stream that answers a `ChatRequest`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rayllm"
    max_model_len: int


class ModelList(msgspec.Struct):
    """The models that are served."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokens(msgspec.Struct):
    """Token ids of a text or conversation, how many they are, and the longest context in tokens."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(msgspec.Struct):
    """The text of token ids."""

    prompt: str


class Version(msgspec.Struct):
    """The version of rayllm."""

    version: str


class Health(msgspec.Struct):
    """Every model can answer."""

    status: Literal["ok"]
    models: list[str]


class ErrorDetail(msgspec.Struct):
    """What is wrong: in words, by its kind, in which field, and as a code if there is one."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is an error."""

    error: ErrorDetail
