"""What a .gguf file says of itself: its metadata by type, and the parts that it was split into."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from rayllm.errors import UsageError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField

T = TypeVar("T", str, int, float, bool)
N = TypeVar("N", int, float)

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


class Metadata:
    """The metadata of `file` by key. Raises UsageError, which names file and key, for what has another type."""

    def __init__(self, file: Path, fields: Mapping[str, ReaderField]) -> None:
        self.file = file
        self._fields = fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    @overload
    def get(self, key: str, kind: type[T]) -> T | None: ...
    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...
    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """The value, or `default` where the file has none; integers count as numbers."""
        if key not in self:
            return default
        value = self._contents(key)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            found = f"an array of {len(value)}" if isinstance(value, list) else repr(value)
            raise self.error(key, f"must be {KINDS[kind]}, not {found[:80]}")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        """The value, which the file must have."""
        if (value := self.get(key, kind)) is None:
            raise self.lacks(key)
        return value

    def positive(self, key: str, kind: type[N], default: N | None = None) -> N:
        """A value > 0, which the file must have unless there is a default."""
        value = self.need(key, kind) if default is None else self.get(key, kind, default)
        if value <= 0:
            raise self.error(key, f"must be positive, not {value}")
        return value

    def of_all_layers(self, key: str, num_layers: int, default: int | None = None) -> int:
        """A positive integer, which may stand once for each layer if it is the same for all."""
        if key not in self or not isinstance(values := self._contents(key), list):
            return self.positive(key, int, default)
        if len(values) != num_layers or len(set(values)) != 1 or type(values[0]) is not int or values[0] < 1:
            raise self.error(key, "must be one positive integer: rayllm runs layers that are all alike")
        return values[0]

    def array(self, key: str, kind: type[T], length: int | None = None) -> list[T] | None:
        """The values, as many as `length` says; None where the file has none. Integers count as numbers."""
        if key not in self:
            return None
        values: Any = self._contents(key)
        found = set(map(type, values)) if isinstance(values, list) and len(self._fields[key].types) <= 2 else {list}
        if not found <= ({int, float} if kind is float else {kind}):
            raise self.error(key, f"must be an array, each entry {KINDS[kind]}")
        if kind is float and not all(map(math.isfinite, values)):
            raise self.error(key, "must be finite numbers")
        if length is not None and len(values) != length:
            raise self.error(key, f"has {len(values)} entries for {length} tokens")
        return values

    def error(self, key: str, problem: str) -> UsageError:
        """An error about a key, to be raised."""
        return UsageError(f"{self.file}: {key} {problem}")

    def lacks(self, key: str) -> UsageError:
        """An error about a key that is not there, to be raised."""
        return UsageError(f"{self.file} lacks {key}")

    def _contents(self, key: str) -> Any:
        try:
            return self._fields[key].contents()
        except UnicodeDecodeError as error:
            raise self.error(key, "is not UTF-8") from error


def part_names(name: str) -> list[str]:
    """The names of all parts of the split .gguf file whose first part is `name`; just `name` for one that is whole.

    Raises UsageError for the name of another part.
    """
    if (match := PART.fullmatch(name)) is None:
        return [name]
    stem, _, count = match.groups()
    names = [f"{stem}-{number:05d}-of-{count}.gguf" for number in range(1, int(count) + 1)]
    if name != names[0]:
        raise UsageError(f"{name} is not the first part of the model: give {names[0]}", "model")
    return names


def read_parts(file: Path) -> tuple[Metadata, dict[str, GGUFReader]]:
    """The metadata of a .gguf file and, by name, the readers of its parts, of which it must be the first.

    Raises UsageError for a file that is damaged, is not the first part, or whose other parts are not beside it.
    """
    first = _read(file)
    metadata = Metadata(file, first.fields)
    count = metadata.get("split.count", int) or 1
    if count == 1:
        return metadata, {file.name: first}
    names = part_names(file.name)
    if (number := metadata.need("split.no", int) + 1) != 1 or len(names) != count:
        raise UsageError(
            f"{file} is part {number} of {count}: give the first, whose name ends in -00001-of-{count:05d}.gguf"
        )
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        raise UsageError(f"{file} is the first of {count} parts: {', '.join(missing)} must be beside it")
    readers = {file.name: first}
    for index, name in enumerate(names[1:], 1):
        readers[name] = _read(file.parent / name)
        part = Metadata(file.parent / name, readers[name].fields)
        if (part.need("split.no", int), part.need("split.count", int)) != (index, count):
            raise part.error("split.no", f"and split.count must be {index} and {count}, as its name says")
    tensors = {tensor.name for reader in readers.values() for tensor in reader.tensors}
    if len(tensors) != (expected := metadata.get("split.tensors.count", int, len(tensors))):
        raise metadata.error("split.tensors.count", f"is {expected}, but the parts have {len(tensors)} tensors")
    return metadata, readers


def _read(file: Path) -> GGUFReader:
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UsageError(f"{file} is not a readable GGUF file: {error}") from error
    if reader.byte_order != "I":
        raise UsageError(f"{file} has the byte order of another kind of machine: convert it to this one's")
    return reader
