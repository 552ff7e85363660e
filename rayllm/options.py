"""Base of configurations: fields that are checked, and flags of the command line that are made of them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

from rayllm.errors import UsageError, check_names


def option(default: Any, doc: str) -> Any:
    """A field of `Options`. `doc` is its flag's help; where `default` is None it says what is used instead."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of configurations: checks the types of its fields, and makes flags of them. Raises `UsageError`."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            if choices := _choices(hint):
                self.check(getattr(self, name) in choices, name, "one of " + ", ".join(choices))
            else:
                kinds = [typing.get_origin(kind) or kind for kind in _kinds(hint)]
                kind = type(getattr(self, name))
                fits = kind in kinds or (kind is int and float in kinds)
                self.check(fits, name, " or ".join(map(_kind_name, kinds)))

    def check(self, ok: bool, name: str, allowed: str) -> None:
        """Raises `UsageError` unless `ok`: the field `name` must be what `allowed` says."""
        if not ok:
            raise UsageError(f"{name} must be {allowed}, not {getattr(self, name)!r}", name)

    @classmethod
    def names(cls) -> list[str]:
        """The names of all fields."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def of(cls, **arguments: Any) -> Self:
        """The configuration of these arguments; an unknown name is a `UsageError` that suggests the nearest one."""
        check_names(arguments, cls.names(), "engine argument")
        return cls(**arguments)

    @classmethod
    def parse(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """`arguments` with texts turned into what their fields hold: "8" into 8, "true" into True, JSON into lists."""
        hints = _hints(cls)
        return {name: _parse(value, hints[name]) if name in hints else value for name, value in arguments.items()}


class HelpFormatter(argparse.HelpFormatter):
    """Ends the help of a flag with its default, unless that is None or empty: then the text says what is used."""

    def _get_help_string(self, action: argparse.Action) -> str | None:  # where argparse's own formatter adds defaults
        if action.default in (None, (), argparse.SUPPRESS) or not action.help:
            return action.help
        return action.help.removesuffix(".") + " (default: %(default)s)."


def add_arguments(group: argparse._ArgumentGroup, cls: type[Options]) -> None:
    """One flag for each field of `cls` but `model`, of the same name with hyphens."""
    for field in dataclasses.fields(cls):
        if field.name == "model":
            continue
        hint = _hints(cls)[field.name]
        settings: dict[str, Any] = {"default": field.default}
        if hint is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif _holds_list(hint):
            settings |= {"nargs": "+", "metavar": "TEXT"}
        elif choices := _choices(hint):
            settings |= {"choices": choices, "type": str}
        else:
            settings["type"] = _kinds(hint)[0]
            settings["metavar"] = settings["type"].__name__.upper()
        action = group.add_argument("--" + field.name.replace("_", "-"), **settings)
        action.help = field.metadata["doc"].replace("%", "%%")  # not before: older Pythons add a bool's default to it


T = TypeVar("T", bound=Options)


def from_arguments(arguments: argparse.Namespace, cls: type[T]) -> T:
    """The configuration that `add_arguments`' flags describe."""
    values = {name: getattr(arguments, name) for name in cls.names()}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _hints(cls: type[Options]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union, None last, or the one type."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _holds_list(hint: Any) -> bool:
    return any(typing.get_origin(kind) is tuple for kind in _kinds(hint))


def _kind_name(kind: type) -> str:
    return "list" if kind is tuple else kind.__name__.removesuffix("Type")


def _choices(hint: Any) -> list[str] | None:
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else None


def _parse(value: Any, hint: Any) -> Any:
    """A value that does not parse stays as it is, to be refused by name."""
    if isinstance(value, list):
        return tuple(value)
    is_text = str in _kinds(hint)
    if not isinstance(value, str) or (is_text and not _holds_list(hint)) or _choices(hint):
        return value
    with contextlib.suppress(ValueError):
        parsed = json.loads(value.lower() if hint is bool else value)
        if isinstance(parsed, list):
            return tuple(parsed)
        return value if is_text else parsed
    return value
