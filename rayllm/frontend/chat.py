"""Conversations as chat templates expect them, which write for one of OpenAI's forms only."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rayllm.config import EngineArgs
from rayllm.errors import UsageError

A = TypeVar("A", bound=EngineArgs)

Messages = list[dict[str, Any]]


def with_chat_template_read(args: A) -> A:
    """`args` for other nodes: the chat template itself in the place of its file. Raises `UsageError`."""
    if args.chat_template is None:
        return args
    return dataclasses.replace(args, chat_template=read_chat_template(args.chat_template))


def read_chat_template(given: str) -> str:
    """The chat template that a file holds, or that is given itself. Raises `UsageError`."""
    is_jinja = re.compile(r"\{[{%]").search
    if is_jinja(given):
        return given
    try:
        text = Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(
            f"chat_template must be a Jinja file or a template, and {given!r} cannot be read: {reason}", "chat_template"
        ) from None
    if not is_jinja(text):
        raise UsageError(f"chat_template {given!r} has no Jinja in it: give a chat template", "chat_template")
    return text


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
