"""The folder of a batch job's answers: part files that are whole or not there, and what is done already."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO, Any

import msgspec

from rayllm.errors import UsageError

PERIOD_S = 1.0
"""Shortest time between two parts."""
PERIOD_SHARE = 0.01
"""That time as a share of the time since the start: a job of any length has some hundred parts, and loses 1 % when it
is killed."""


class Job(msgspec.Struct):
    """What an output folder belongs to, in its file `job.json`."""

    model: str
    input: dict[str, str]
    """Hashes of the files, by name."""


class _Answer(msgspec.Struct):
    custom_id: str
    error: Any = None


class JobOutput:
    """The folder while a job writes to it; a context manager, whose end writes what is left.

    Raises `UsageError` for a folder that is another job's, or in use.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.done: set[str] = set()
        """The `custom_id`s that are answered."""
        self.num_failed = 0
        """How many of those have an error for an answer."""
        self._lines: list[bytes] = []
        self._num_parts = 0
        self._lock: IO[str] | None = None

    def __enter__(self) -> JobOutput:
        foreign = self.folder.exists() and (
            not self.folder.is_dir() or (any(self.folder.iterdir()) and not (self.folder / "lock").exists())
        )
        if foreign:
            raise UsageError(f"{self.folder} is no output of a batch job: name an empty or a new folder", "output")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UsageError(
                f"another batch job is writing to {self.folder}: wait for its end, or stop it", "output"
            ) from None
        self.spool.mkdir(exist_ok=True)
        self._start = self._written = time.monotonic()
        return self

    @property
    def spool(self) -> Path:
        """A folder for files that last as long as the job."""
        return self.folder / "tmp"

    def begin(self, job: Job) -> None:
        """Reads what is done of `job`; raises `UsageError` if the folder is another job's."""
        file = self.folder / "job.json"
        if not file.exists():
            self._write(file, msgspec.json.format(msgspec.json.encode(job)))
            return
        known = msgspec.json.decode(file.read_bytes(), type=Job)
        if known.input != job.input:
            raise UsageError(
                f"{self.folder} belongs to other input ({', '.join(known.input)}): name another folder", "output"
            )
        if known.model != job.model:
            raise UsageError(f"{self.folder} has answers of the model {known.model}: name another folder", "output")
        decoder = msgspec.json.Decoder(_Answer)
        for part in sorted(self.folder.glob("part-*.jsonl")):
            self._num_parts = int(part.stem.removeprefix("part-")) + 1
            with part.open("rb") as stream:
                for line in stream:
                    answer = decoder.decode(line)
                    self.done.add(answer.custom_id)
                    self.num_failed += answer.error is not None

    def add(self, keys: list[str], lines: list[bytes], num_failed: int) -> None:
        """Takes answers, each a line without its end; writes a part if it is time."""
        self.done.update(keys)
        self.num_failed += num_failed
        self._lines += lines
        now = time.monotonic()
        if now - self._written > max(PERIOD_S, PERIOD_SHARE * (now - self._start)):
            self._flush()

    def _flush(self) -> None:
        if self._lines:
            self._write(self.folder / f"part-{self._num_parts:06}.jsonl", b"\n".join([*self._lines, b""]))
            self._num_parts += 1
            self._lines.clear()
        self._written = time.monotonic()

    def _write(self, file: Path, content: bytes) -> None:
        """Writes all or nothing, whatever happens meanwhile."""
        temporary = self.spool / file.name
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(file)

    def __exit__(self, *exception: Any) -> None:
        try:
            self._flush()
            for file in self.spool.iterdir():
                file.unlink()
            self.spool.rmdir()
        finally:
            assert self._lock is not None
            self._lock.close()
