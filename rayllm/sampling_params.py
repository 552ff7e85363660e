"""What a request may ask of the sampler. Names and meanings follow vLLM's SamplingParams.

Each range stands here once, in a type; the service's bodies (`deployments.protocol`) are made of the same types, and
say where HTTP allows less.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta, inspect

from rayllm.errors import UsageError, check_names

MAX_ID = 2**31 - 1
"""The largest token id that an int32 holds."""
MAX_INT = 2**63 - 1
"""The largest number that travels: as good as no limit."""
MAX_CHOICES = 128
MAX_LOGPROBS = 64

TokenId = Annotated[int, Meta(ge=0, le=MAX_ID)]
NumChoices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Temperature = Annotated[float, Meta(ge=0, le=100)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, le=MAX_INT)]
MinP = Annotated[float, Meta(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
LogitBias = dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]]
Seed = Annotated[int, Meta(ge=-(2**63), le=MAX_INT)]
MaxTokens = Annotated[int, Meta(ge=1, le=MAX_INT)]
MinTokens = Annotated[int, Meta(ge=0, le=MAX_INT)]
StopString = Annotated[str, Meta(min_length=1)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
SnapkvLimit = Annotated[int, Meta(ge=1, le=MAX_INT)] | Literal["all"]


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What an answer must be: exactly one of the fields, by vLLM's names."""

    json: dict[str, Any] | str | None = None
    """A JSON schema, or its text."""
    json_object: Literal[True] | None = None
    """Any JSON object."""
    regex: str | None = None
    choice: Annotated[list[StopString], Meta(min_length=1)] | None = None
    """One of these texts."""
    grammar: str | None = None
    """In Lark's language, as llguidance reads it."""

    def __post_init__(self) -> None:
        given = msgspec.structs.asdict(self)
        if sum(value is not None for value in given.values()) != 1:
            raise UsageError(f"structured_outputs must have exactly one of {', '.join(given)}", "structured_outputs")


class _Named(msgspec.StructMeta):
    """A class whose fields are known by name: others are refused with the nearest, where Python raises a TypeError."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        check_names(fields, cls.__struct_fields__, "sampling parameter")
        return super().__call__(*args, **fields)


class SamplingParams(msgspec.Struct, metaclass=_Named, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request; checked when made, so an instance is always valid.

    Raises `UsageError`, naming the field and what it may be.
    """

    n: NumChoices = 1
    """Number of choices; choice i samples with `seed + i`."""
    temperature: Temperature = 1.0
    """How random the output is; 0 is greedy (ties go to the lower token id)."""
    top_p: TopP = 1.0
    """Keep the likeliest tokens that make up this probability."""
    top_k: TopK = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    min_p: MinP = 0.0
    """Keep tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: RepetitionPenalty = 1.0
    """Logits of tokens in the prompt or output are divided (positive) or multiplied (negative) by it."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit as many times as the output has the token."""
    logit_bias: LogitBias | None = None
    """Values added to the logits of tokens, by token id."""
    seed: Seed | None = None
    """Same seed, same prompt, same output, whatever else is in the batch. Without it, one is drawn."""
    max_tokens: MaxTokens | None = 16
    """Longest output, in tokens; none: up to the end of the context."""
    min_tokens: MinTokens = 0
    """No end of sequence, stop token or stop string before so many output tokens."""
    stop: StopString | list[StopString] | None = None
    """Text that ends the output; not part of it unless `include_stop_str_in_output`."""
    stop_token_ids: list[TokenId] = []
    """Tokens that end the output; their text is no part of it unless `include_stop_str_in_output`."""
    include_stop_str_in_output: bool = False
    """Whether what ended the output is part of its text."""
    ignore_eos: bool = False
    """Whether the output goes on after an end-of-sequence token."""
    logprobs: NumLogprobs | None = None
    """Log-probabilities of each output token and of so many likeliest tokens, before any processing."""
    prompt_logprobs: NumLogprobs | None = None
    """Log-probabilities of the prompt's tokens but the first, likewise; such a request takes no prefix-cache hits."""
    skip_special_tokens: bool = True
    """Whether special tokens are left out of the text."""
    structured_outputs: StructuredOutputs | None = None
    """What the output must be; a dict of one field will do. It ends where that ends, whatever the other fields say."""
    snapkv_limit: SnapkvLimit | None = None
    """Tokens of the prompt that keep their KV, where the engine prunes, or "all". Without it, the engine's limit."""

    def __post_init__(self) -> None:
        if isinstance(self.structured_outputs, dict):
            msgspec.structs.force_setattr(self, "structured_outputs", _structured(self.structured_outputs))
        try:
            msgspec.convert(msgspec.structs.asdict(self), _Values)
        except msgspec.ValidationError:
            raise self._refusal() from None
        if any("\ud800" <= char <= "\udfff" for text in self.stop_strings for char in text):
            raise UsageError("stop must be Unicode, but holds half of a surrogate pair", "stop")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}", "min_tokens"
            )

    def _refusal(self) -> UsageError:
        """The error of the first field whose value is not of its type."""
        for name, hint in _HINTS.items():
            value = getattr(self, name)
            try:
                msgspec.convert(value, hint)
            except msgspec.ValidationError:
                return UsageError(f"{name} must be {self.allowed(name)}, not {value!r}", name)
        raise AssertionError("every field is of its type")

    @staticmethod
    def allowed(name: str) -> str:
        """What the field of that name may be, for an error message."""
        return _words(inspect.type_info(_HINTS[name]))

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


def _structured(given: dict[str, Any]) -> StructuredOutputs:
    try:
        return msgspec.convert(given, StructuredOutputs)
    except msgspec.ValidationError as error:
        message = str(error)
        if not message.startswith("structured_outputs"):
            message = f"structured_outputs: {message}"
        raise UsageError(message, "structured_outputs") from None


_HINTS: dict[str, Any] = get_type_hints(SamplingParams, include_extras=True)
_Values = msgspec.defstruct("_Values", list(_HINTS.items()))
"""The same fields and no check of its own, so that msgspec can check values that are in Python already."""


def _words(kind: inspect.Type) -> str:
    """What values of a type are, for an error message."""
    match kind:
        case inspect.UnionType():
            return ", or ".join(map(_words, kind.types))
        case inspect.IntType():
            return (
                f"an integer, at least {kind.ge}" if kind.le == MAX_INT else f"an integer from {kind.ge} to {kind.le}"
            )
        case inspect.FloatType():
            return (
                f"a number from {kind.ge} to {kind.le}" if kind.gt is None else f"a number over {kind.gt}, to {kind.le}"
            )
        case inspect.BoolType():
            return "True or False"
        case inspect.StrType():
            return "a non-empty text"
        case inspect.LiteralType():
            return " or ".join(map(repr, kind.values))
        case inspect.ListType():
            return f"a list, each item {_words(kind.item_type)}"
        case inspect.StructType():
            return f"a map of one of {', '.join(field.name for field in kind.fields)}"
        case inspect.DictType():
            return f"a map, each key {_words(kind.key_type)}, each value {_words(kind.value_type)}"
    return "None"
