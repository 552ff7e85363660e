"""Bodies of requests as they are sent, made into what `deployments.protocol` describes."""

from __future__ import annotations

import codecs
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def decode_body(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The request that JSON text describes. A byte order mark before it says nothing, nor do fields of the request and
    of its messages that are null, known or not; 2.0 is the integer 2.

    Raises msgspec's `DecodeError` for what is no JSON, its `ValidationError` for a field that is wrong, and
    `UnicodeDecodeError`.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        try:
            return decoder.decode(data)
        except msgspec.ValidationError:  # perhaps for these alone
            body = _without_nulls(_with_integers(msgspec.json.decode(data)))
            return decoder.decode(msgspec.json.encode(body))
    except RecursionError:
        raise msgspec.DecodeError("it is nested too deeply") from None


def _without_nulls(value: Any) -> Any:
    """The object without its null fields and those of objects that its fields list."""
    if not isinstance(value, dict):
        return value
    given = {name: item for name, item in value.items() if item is not None}
    return {
        name: [_without_nulls(element) for element in item] if isinstance(item, list) else item
        for name, item in given.items()
    }


def _with_integers(value: Any) -> Any:
    """The value with integers for all numbers that are whole."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _with_integers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    return value
