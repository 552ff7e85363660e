"""What an answer must be, as a grammar of llguidance, which the shards make masks of tokens from.

Compiling it here refuses what cannot be served before anything is computed: keywords that llguidance does not know,
patterns that grow beyond its limits, schemas that are larger than ours.
"""

from __future__ import annotations

import json
from functools import lru_cache

import llguidance
import msgspec

from rayllm.errors import UsageError
from rayllm.sampling_params import StructuredOutputs

MAX_BYTES = 64 << 10
"""The largest schema or grammar: a shard can take so long to compile a larger one that others wait."""
PROBED_BYTES = 64
"""How many bytes a grammar is followed for: one that grows beyond its limits does so soon."""


class _Bytes:
    """A vocabulary of single bytes: whether a grammar can be compiled does not depend on the model's."""

    tokens = [bytes([byte]) for byte in range(256)] + [b"<eos>"]
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@lru_cache(maxsize=1)
def _tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))


def grammar_of(structured: StructuredOutputs, field: str = "structured_outputs") -> str:
    """The grammar, as llguidance's text; takes milliseconds, and none if it was asked for lately.

    Raises `UsageError` that says what is wrong with it, which came as `field`.
    """
    try:
        encoded = msgspec.json.encode(structured)
        if len(encoded) <= MAX_BYTES:
            return _compiled(encoded)
    except (ValueError, TypeError, RecursionError) as error:  # a text that is not Unicode is a ValueError
        raise UsageError(f"{field} cannot be served: {str(error).splitlines()[0]}", field) from None
    raise UsageError(f"{field} must be at most {MAX_BYTES} bytes, not {len(encoded)}", field)


@lru_cache(maxsize=256)
def _compiled(encoded: bytes) -> str:
    grammar = _grammar(msgspec.json.decode(encoded, type=StructuredOutputs))
    matcher = llguidance.LLMatcher(_tokenizer(), grammar, log_level=0)
    for _ in range(PROBED_BYTES):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        if matcher.is_stopped():
            break
        matcher.consume_token(_last_byte(mask))
    return grammar


def _last_byte(mask: bytes) -> int:
    """The highest byte that a mask allows, else the end."""
    allowed = int.from_bytes(mask[:32], "little")
    return allowed.bit_length() - 1 if allowed else _Bytes.eos_token_id


def _grammar(structured: StructuredOutputs) -> str:
    matcher = llguidance.LLMatcher
    if structured.json is not None:
        return matcher.grammar_from_json_schema(structured.json)
    if structured.json_object:
        return matcher.grammar_from_json_schema({"type": "object"})
    if structured.regex is not None:
        return matcher.grammar_from_regex(structured.regex)
    if structured.choice is not None:
        return matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, structured.choice)))
    return matcher.grammar_from_lark(structured.grammar or "")
