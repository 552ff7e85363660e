"""The HTTP bodies of requests: OpenAI's chat completions and completions, and what goes with them.

The types, and those of `deployments.answers`, are the one source of truth: bodies are decoded and encoded by them, and
`/openapi.json` is made of them. A field that is not here is refused by name, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

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

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Every event has the usage so far."""
    include_obfuscation: bool | None = None
    """Nothing is obfuscated, whatever it says."""


class TextFormat(Body, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(Body, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(Body):
    """A schema by OpenAI's fields; answers keep to it, whether it is strict or not."""

    name: str
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class JsonSchemaFormat(Body, tag_field="type", tag="json_schema"):
    """JSON that keeps to a schema."""

    json_schema: JsonSchema


class GenerationRequest(Body, kw_only=True):
    """What both kinds of completion take. A field that is null is as if it were absent."""

    model: str | None = None
    """May be left out where one model is served; so may it in the other requests."""
    store: bool | None = None
    """Nothing is stored, whatever it says; nor do the next fields change the answer."""
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
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
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    structured_outputs: sampling.StructuredOutputs | None = None
    """What the answer must be, if `response_format` does not say it."""
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
    max_tokens: Annotated[int, Meta(ge=0, le=sampling.MAX_INT)] | None = None
    """0 scores the prompt, with `echo`."""
    best_of: sampling.NumChoices | None = None
    """As `n`, of which it would be the best, or absent."""
    suffix: Literal[""] | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None


class TextPart(Body, tag_field="type", tag="text"):
    """A part of a message's content; there are no parts but text."""

    text: str


Content = str | list[TextPart]


class FunctionCall(Body):
    """The function that a tool call names, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that an earlier answer made."""

    id: str
    function: FunctionCall
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
    """Answers are sent back as they came, from whichever server, with the fields that are empty here."""

    content: Content | None = None
    reasoning_content: str | None = None
    """What it thought before, for templates that know it."""
    tool_calls: list[ToolCall] | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Message, kw_only=True, tag="tool"):
    """What a tool that was called returned."""

    content: Content
    tool_call_id: str


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


NoList = Annotated[list[Any], Meta(max_length=0)]


class ChatRequest(GenerationRequest, kw_only=True):
    """A conversation to answer."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    verbosity: Literal["low", "medium", "high"] | None = None
    """A variable of the chat template, which may know it."""
    parallel_tool_calls: bool | None = None
    """There are no tools: it changes nothing."""
    tools: NoList | None = None
    functions: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    max_completion_tokens: sampling.MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None


NOTHING = {
    "tools": "[]",
    "functions": "[]",
    "tool_choice": "'none' or 'auto'",
    "function_call": "'none' or 'auto'",
    "modalities": "['text']",
    "suffix": "''",
}
"""Fields whose only values ask for nothing: that they are known is for clients that always send them."""


class TokenizeRequest(Body):
    """`prompt`, or `messages` through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """True unless it is false."""
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """Token ids to turn into text."""

    tokens: list[sampling.TokenId]
    model: str | None = None
