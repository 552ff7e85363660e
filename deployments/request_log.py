"""What `--log-requests` tells: a line for each request, with numbers and names of ours, and no text of it."""

from __future__ import annotations

import logging
import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field
from urllib.parse import quote

logger = logging.getLogger("ray.serve")

MAX_LINES = 10_000
"""Lines that wait to be asked for, at most: nobody asks where the service was not started by `rayllm serve`."""


@dataclass
class RequestRecord:
    """What is known of a request while it is answered."""

    id: str
    kind: str
    """The path, or the method that a Python handle called."""
    start: float = field(default_factory=time.monotonic)
    model: str = ""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    finish: str = ""
    """How its choices ended: stop, length, abort, error; several with commas."""

    def line(self, status: int) -> str:
        """All of it as `name=value`; what came from outside cannot look like another line."""
        fields = {
            "id": quote(self.id),
            "model": self.model,
            "path": quote(self.kind),
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self.num_output_tokens,
            "finish": self.finish,
            "seconds": f"{time.monotonic() - self.start:.3f}",
            "status": status,
        }
        return " ".join(f"{name}={'-' if value == '' else value}" for name, value in fields.items())


CURRENT: ContextVar[RequestRecord | None] = ContextVar("request", default=None)
"""The request that is being answered, for whatever learns more of it."""


class RequestLog:
    """The lines of one Api process: in Serve's log, and for whoever asks for them."""

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._lines: deque[str] = deque(maxlen=MAX_LINES)

    def begin(self, request_id: str, kind: str) -> RequestRecord:
        """A request's record, which is `CURRENT` from now on."""
        record = RequestRecord(request_id, kind)
        CURRENT.set(record)
        return record

    def end(self, record: RequestRecord, status: int) -> None:
        """Tells of a request whose answer has ended, with this HTTP status."""
        if self._is_on:
            line = record.line(status)
            self._lines.append(line)
            logger.info(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines = list(self._lines)
        self._lines.clear()
        return lines
