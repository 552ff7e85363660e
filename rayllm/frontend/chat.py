"""Conversations as chat templates expect them, which write for one of OpenAI's forms only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Messages = list[dict[str, Any]]


def render_chat(messages: Sequence[dict[str, Any]], template: str, render: Callable[[Messages], str]) -> str:
    """What `render` makes of the messages with this template, in whose own words they are put: "developer" is "system"
    where it knows no such role; the arguments of tool calls, JSON texts, are the mappings that most templates take
    them for, or else texts.
    """
    renamed = {} if "developer" in template else {"developer": "system"}
    plain = [message | {"role": renamed.get(message.get("role", ""), message.get("role"))} for message in messages]
    found: list[dict[str, Any]] = []
    mapped = [_with_mappings(message, found) for message in plain]
    try:
        text = render(mapped)
        if not any(str(arguments) in text for arguments in found):  # Python's way to write them
            return text
    except TypeError:  # a text and a mapping cannot be joined
        pass
    return render(plain)


def _with_mappings(message: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message with its tool calls' arguments as mappings, all of which are appended to `found`, but for `{}`."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    return message | {"tool_calls": [_with_mapping(call, found) for call in calls]}


def _with_mapping(call: Any, found: list[dict[str, Any]]) -> Any:
    try:
        function = call["function"]
        arguments = json.loads(function["arguments"] or "{}")
    except (KeyError, TypeError, ValueError, RecursionError):  # they are a mapping already, or what a model made up
        return call
    if not isinstance(arguments, dict):
        return call
    if arguments:
        found.append(arguments)
    return call | {"function": function | {"arguments": arguments}}
