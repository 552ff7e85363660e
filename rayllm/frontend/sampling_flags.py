"""The flags that are sampling parameters: one for each field of `SamplingParams`, made of its type and its words."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, get_type_hints

import msgspec
from msgspec.inspect import BoolType, DictType, FloatType, IntType, ListType, StructType, Type, UnionType, type_info

from rayllm.command_line import add_flag
from rayllm.config import EngineArgs
from rayllm.sampling_params import SamplingParams

DEFAULTS = {"temperature": 0.0, "max_tokens": 256}
"""Where they differ at a terminal."""
METAVARS: dict[type[Type], str] = {IntType: "INT", FloatType: "FLOAT", DictType: "JSON", StructType: "JSON"}


def add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    """One flag for each field, `--request-…` where the engine has an argument of the same name."""
    defaults = msgspec.structs.asdict(SamplingParams()) | DEFAULTS
    docs, hints = _docs(SamplingParams), get_type_hints(SamplingParams, include_extras=True)
    for name, hint in hints.items():
        kind = type_info(hint)
        kinds = kind.types if isinstance(kind, UnionType) else (kind,)
        items = next((kind.item_type for kind in kinds if isinstance(kind, ListType)), None)
        settings: dict[str, Any]
        if isinstance(kind, BoolType):
            settings = {"action": argparse.BooleanOptionalAction}
        elif items is not None:
            metavar = METAVARS.get(type(items), "TEXT")
            settings = {"action": "append", "metavar": metavar, "type": str if metavar == "TEXT" else _read}
        else:
            settings = {"type": _reader(hint), "metavar": METAVARS[type(kinds[0])]}
        told = docs[name] + (" May be given several times." if items is not None else "")
        if defaults[name] not in (None, []):
            told = f"{told.removesuffix('.')} (default: {defaults[name]})."
        add_flag(group, _flag(name), default=argparse.SUPPRESS, help=told, **settings)


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """What the flags of `add_sampling_arguments` say. Raises `UsageError`."""
    names = SamplingParams.__struct_fields__
    given = {name: getattr(options, _flag(name)) for name in names if hasattr(options, _flag(name))}
    return SamplingParams(**(DEFAULTS | given))


def _flag(name: str) -> str:
    return f"request_{name}" if name in EngineArgs.names() else name


def _reader(hint: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = _read(text)
        with suppress(msgspec.ValidationError):
            return msgspec.convert(value, hint, str_keys=True)
        return value

    return read


def _read(text: str) -> Any:
    """A number, None or JSON; what is none of them stays as it is, to be refused by name."""
    if text.lower() == "none":
        return None
    for read in (json.loads, float):
        with suppress(ValueError):
            return read(text)
    return text


def _docs(cls: type) -> dict[str, str]:
    """The words under each field of a class, which Python keeps in the source only."""
    [definition] = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }
