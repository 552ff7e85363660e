"""Rows of batch jobs: where they stand in JSON Lines or Parquet files, and what they are called."""

from __future__ import annotations

import codecs
import contextlib
import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash
from tqdm import tqdm

from rayllm.errors import UsageError

SUFFIXES = (".jsonl", ".parquet")
SPOOL_ROWS = 1024


class Row(NamedTuple):
    """Where a request stands."""

    key: str
    """Its `custom_id` or `id`; without one the file's name and the row's number, as in "in.jsonl:17"."""
    path: str
    """The JSON Lines file that has it."""
    offset: int
    """Where its line begins there, in bytes."""


@dataclass(frozen=True)
class JobInput:
    """All rows of a job's files."""

    rows: list[Row]
    hashes: dict[str, str]
    """Hash of each file's content, by name."""
    models: dict[str, str]
    """The models that rows name, each with the key of the first row that does."""


class _Body(msgspec.Struct):
    model: Any = None


class _Head(_Body):
    custom_id: Any = None
    id: Any = None
    body: msgspec.Raw = msgspec.Raw()


def find_files(pattern: str) -> dict[str, Path]:
    """The files of a path, of a folder or of a glob, by name; raises `UsageError` if there are none."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix in SUFFIXES]
    else:
        found = [path] if path.is_file() else [Path(file) for file in glob.glob(str(path)) if os.path.isfile(file)]
    if not found:
        raise UsageError(
            f"no input at {pattern!r}: give a .jsonl or .parquet file, a folder of such files, or a glob", "input"
        )
    parent = os.path.commonpath([file.absolute().parent for file in found])
    return {_text(file.absolute().relative_to(parent)): file.absolute() for file in sorted(found)}


def _text(path: Path) -> str:
    """As it can be written, whatever bytes it has."""
    return os.fsencode(path).decode(errors="replace")


def read_input(files: dict[str, Path], spool: Path) -> JobInput:
    """Finds all rows; those of Parquet files are copied to JSON Lines files in the folder `spool`.

    Raises `UsageError` for files that cannot be read, and for two rows of one name. What else is wrong with a row is
    its answer's affair.
    """
    rows: list[Row] = []
    hashes = {}
    models: dict[str, str] = {}
    numbers: dict[str, int] = {}
    """Number of each row, by key."""
    starts: dict[str, int] = {}
    """Number of each file's first row, by name."""
    size = sum(file.stat().st_size for file in files.values())
    with tqdm(desc="reading input", total=size, unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
        for name, file in files.items():
            hashes[name] = _hash(file)
            starts[name] = len(rows)
            lines = file if file.suffix != ".parquet" else _spooled(file, spool / f"rows-{len(hashes)}.jsonl")
            for row, model in _rows(name, lines):
                if (first := numbers.setdefault(row.key, len(rows))) != len(rows):
                    other = [known for known, start in starts.items() if start <= first][-1]
                    places = f"{other} and {name}" if other != name else name
                    raise UsageError(
                        f"custom_id must differ between rows, but {row.key!r} stands twice: see {places}", "custom_id"
                    )
                rows.append(row)
                if model is not None:
                    models.setdefault(model, row.key)
            bar.update(file.stat().st_size)
    return JobInput(rows, hashes, models)


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _rows(name: str, path: Path) -> Iterator[tuple[Row, str | None]]:
    """The rows, and the models that they name."""
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            row = line.removeprefix(codecs.BOM_UTF8)
            if row.strip():
                key, model = _head(row)
                yield Row(key or f"{name}:{number}", str(path), offset + len(line) - len(row)), model
            offset += len(line)


def _head(row: bytes) -> tuple[str | None, str | None]:
    """A row's name and its model's, where it has them."""
    try:
        head = msgspec.json.decode(row, type=_Head)
    except (ValueError, RecursionError):
        return None, None
    given = head.id if head.custom_id is None else head.custom_id
    model = head.model
    with contextlib.suppress(ValueError, RecursionError):
        if bytes(head.body):
            body = msgspec.json.decode(head.body, type=_Body | str)
            model = (msgspec.json.decode(body, type=_Body) if isinstance(body, str) else body).model
    key = str(given) if isinstance(given, str | int) and given != "" else None
    return key, model if isinstance(model, str) else None


def _spooled(file: Path, path: Path) -> Path:
    """The rows of a Parquet file as JSON Lines; a null is an absent field, which Parquet has no other word for."""
    import pyarrow
    import pyarrow.parquet

    encoder = msgspec.json.Encoder(enc_hook=str)
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet, path.open("wb") as stream:
            for batch in parquet.iter_batches(SPOOL_ROWS):
                stream.write(encoder.encode_lines([_without_nulls(row) for row in batch.to_pylist()]))
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{file} is not readable Parquet: {' '.join(str(error).split())}", "input") from None
    return path


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def read_lines(rows: Iterable[Row]) -> Iterator[bytes]:
    """The rows' JSON."""
    with contextlib.ExitStack() as opened:
        path, stream = "", None
        for row in rows:
            if stream is None or row.path != path:
                opened.close()
                path, stream = row.path, opened.enter_context(open(row.path, "rb"))
            stream.seek(row.offset)
            yield stream.readline()
